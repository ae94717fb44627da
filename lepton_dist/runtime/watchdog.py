"""The watchdog: ends this rank, with its stacks on stderr, when it makes no progress before a deadline.

The main thread may be stuck inside an MPI call, where no signal handler and no exception reaches it. So a thread of its
own, which never touches MPI, watches the clock. For the case that the interpreter's lock is held for ever, in which no
thread of Python runs, it sends a beat to the rank's guardian (`guardian.py`), which ends a rank that has gone silent.
Time in which the process was stopped, as SLURM does to jobs that it suspends, does not count.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lepton_dist.errors import EXIT_FAILED
from lepton_dist.telemetry.stopwatch import Stopwatch

TICK_S = 1.0
"""The thread looks at the clock at least this often, in seconds."""

SILENCE_S = 60.0
"""How much later than this thread the guardian ends a rank from which it hears nothing, in seconds."""


class Watchdog:
    """Ends the process with exit code 70 unless it is fed before each deadline. One a process.

    `label` names the rank in the message, such as ``rank 3 on host n7 (pid 4711)``. Use it as a context manager, or
    call `disarm`. It writes to the file descriptor `stream`, by default stderr's. `beat` is told at every tick how many
    seconds of silence may follow.
    """

    def __init__(
        self,
        label: str,
        timeout_s: float,
        *,
        phase: str = "starting",
        stream: int = 2,
        beat: Callable[[float], object] | None = None,
    ) -> None:
        self._label, self._timeout_s, self._phase, self._stream = label, timeout_s, phase, stream
        self._beat = beat
        self._num_fed = 0
        self._disarmed = threading.Event()
        if beat is not None:
            faulthandler.enable(stream)  # a rank that its guardian ends by a signal says where it was
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def feed(self, *, timeout_s: float | None = None, phase: str | None = None) -> None:
        """Report progress. With another timeout (in seconds) or phase, the next deadline is that one's. Cheap."""
        if timeout_s is not None:
            self._timeout_s = timeout_s
        if phase is not None:
            self._phase = phase
        self._num_fed += 1

    def pause(self) -> None:
        """Expect nothing until the next `feed`: a script that does something else makes no progress here."""
        self._timeout_s = math.inf

    def disarm(self) -> None:
        """Stop watching, for good."""
        self._disarmed.set()
        self._thread.join()
        if self._beat is not None:
            self._beat(0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disarm()

    def _watch(self) -> None:
        hungry, seen = Stopwatch(), self._num_fed
        while True:
            if self._beat is not None:
                self._beat(0.0 if math.isinf(self._timeout_s) else self._timeout_s + SILENCE_S)
            # At most a tick at a time: a shorter timeout may have been set meanwhile.
            if self._disarmed.wait(min(max(self._timeout_s - hungry.look(), 0.0), TICK_S)):
                return
            if seen != self._num_fed:
                seen = self._num_fed
                hungry.restart()
            elif hungry.look() >= self._timeout_s:
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
