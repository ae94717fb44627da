"""The watchdog: ends this rank, with its stacks on stderr, when it makes no progress before a deadline.

The main thread may be stuck inside an MPI call, where no signal handler and no exception reaches it. So a thread of its
own, which never touches MPI, watches the clock; and behind it stands faulthandler's thread in C, for the case that the
interpreter's lock is held for ever.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

from lepton_dist.errors import EXIT_FAILED

REARM_S = 1.0
"""The C thread is armed anew at most this often, in seconds: that costs a thread start."""

MARGIN_S = 2.0
"""How much later than the Python thread the C thread fires, in seconds."""


class Watchdog:
    """Ends the process with exit code 70 unless it is fed before each deadline. One a process.

    `label` names the rank in the message, such as ``rank 3 on host n7 (pid 4711)``. Use it as a context manager, or
    call `disarm`. It writes to the file descriptor `stream`, by default stderr's.
    """

    def __init__(self, label: str, timeout_s: float, *, phase: str = "starting", stream: int = 2) -> None:
        self._label, self._timeout_s, self._phase, self._stream = label, timeout_s, phase, stream
        self._fed_s = self._armed_s = time.monotonic()
        self._disarmed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._arm(self._fed_s)
        self._thread.start()

    def feed(self, *, timeout_s: float | None = None, phase: str | None = None) -> None:
        """Report progress. With another timeout (in seconds) or phase, the next deadline is that one's. Cheap."""
        now = time.monotonic()
        is_longer = timeout_s is not None and timeout_s > self._timeout_s
        if timeout_s is not None:
            self._timeout_s = timeout_s
        if phase is not None:
            self._phase = phase
        self._fed_s = now
        if is_longer or now - self._armed_s >= REARM_S:
            self._arm(now)

    def disarm(self) -> None:
        """Stop watching, for good."""
        self._disarmed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disarm()

    def _arm(self, now: float) -> None:
        self._armed_s = now
        # Armed up to REARM_S ago when fed: the sum keeps it behind the Python thread's deadline.
        faulthandler.dump_traceback_later(self._timeout_s + REARM_S + MARGIN_S, exit=True, file=self._stream)

    def _watch(self) -> None:
        while True:
            # At most a second at a time: a shorter timeout may have been set meanwhile.
            wait_s = min(self._fed_s + self._timeout_s - time.monotonic(), 1.0)
            if self._disarmed.wait(max(wait_s, 0.0)):
                return
            if time.monotonic() >= self._fed_s + self._timeout_s:
                self._bite()

    def _bite(self) -> None:
        message = (
            f"lepton-dist: {self._label} made no progress for {self._timeout_s:g} s while {self._phase}; "
            "ending it. Where each thread was:\n"
        )
        os.write(self._stream, message.encode())
        faulthandler.dump_traceback(file=self._stream, all_threads=True)
        sys.stdout.flush()
        os._exit(EXIT_FAILED)
