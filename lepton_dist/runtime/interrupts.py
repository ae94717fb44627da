"""Signals: where something is in flight the first asks for an orderly stop; any other leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lepton_dist.errors import EXIT_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupts:
    """The signals that ask this job to stop. On ranks other than 0 they are ignored: rank 0 tells those."""

    def __init__(self) -> None:
        self.name = ""
        self.is_orderly = False
        """Whether the first signal only sets `name`, for the program to heed. Else it leaves: nothing would be lost."""

        self._leave: Callable[[], object] | None = None

    @property
    def is_requested(self) -> bool:
        """Whether a signal has asked for a stop."""
        return bool(self.name)

    def install(self, leave: Callable[[], object]) -> None:
        """Start listening; `leave` ends the process and does not return."""
        self._leave = leave
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second = self.is_requested
        self.name = signal.Signals(number).name
        if self._leave is not None and (is_second or not self.is_orderly):
            _say(f"{self.name}: leaving at once; the same command resumes")
            self._leave()


class Deferred:
    """Whether an interrupt from the keyboard (SIGINT) has come and waits for a place where it can be answered."""

    def __init__(self) -> None:
        self.is_requested = False

    def answer(self) -> None:
        """Answer one that waits.

        Raises:
            Interrupted: there is one.
        """
        if self.is_requested:
            self.is_requested = False
            raise Interrupted


class Interrupted(KeyboardInterrupt):
    """A `KeyboardInterrupt` raised where nothing is left half done."""


@contextmanager
def deferred_interrupts() -> Iterator[Deferred]:
    """Within the block the first SIGINT only waits to be answered; a second one strikes where it comes.

    In the middle of a step it would leave the ranks in different places. Only the main thread gets signals: in any
    other one nothing is deferred.
    """
    deferred = Deferred()
    if threading.current_thread() is not threading.main_thread():
        yield deferred
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        if deferred.is_requested and callable(before):
            before(number, frame)
        deferred.is_requested = True

    if not callable(before):  # ignored, or left to the system: as the script wants it
        yield deferred
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield deferred
    finally:
        signal.signal(signal.SIGINT, before)


def ignore_interrupts() -> None:
    """Leave signals to rank 0, or, where it is about to leave itself, unanswered."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_on_interrupts(*, is_quiet: bool, by_signal: bool) -> None:
    """Until there is a job to speak of, a signal ends this process. `is_quiet` on all ranks but one.

    `by_signal`: die of the signal itself, for a launcher that takes the exit of a rank before MPI's start for a good
    one, whatever its code, and leaves the others waiting for it inside MPI's start.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if not is_quiet:
            _say(f"{signal.Signals(number).name}: leaving before the start")
        if by_signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        os._exit(EXIT_STOPPED)

    for number in SIGNALS:
        signal.signal(number, leave)


def _say(text: str) -> None:
    # Not through sys.stderr, which the signal may have interrupted.
    os.write(2, f"lepton-dist: {text}\n".encode())
