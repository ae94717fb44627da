"""Standard streams that may be closed, full, narrow or read by nobody.

What is only shown must not decide what is done.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO

_STDIN, _STDOUT, _STDERR = 0, 1, 2


def secure_standard_streams() -> None:
    """At a command's start: give closed streams a place to go, let stderr never fail, and stdout take any text.

    A closed descriptor must be taken at once: else the next file that is opened, such as the output, gets its number,
    and what is printed goes into it.
    """
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is this one: those below are open.
            os.open(os.devnull, os.O_RDONLY if descriptor == _STDIN else os.O_WRONLY)
    if sys.stdout is None:
        sys.stdout = os.fdopen(_STDOUT, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(_STDERR, "w", encoding="utf-8", closefd=False)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal in ASCII, a text with umlauts
    if not isinstance(sys.stderr, QuietStream):
        sys.stderr = QuietStream(sys.stderr)


class QuietStream:
    """A text stream whose faults are nobody's business: once writing fails, nothing more is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_lost = False

    def write(self, text: str) -> int:
        """Write, or not; the length of the text."""
        if not self._is_lost:
            try:
                self._stream.write(text)
            except (OSError, ValueError):  # its reader has left, its disk is full; or somebody closed it
                self._is_lost = True
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        if not self._is_lost:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._is_lost = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Show:
    """Prints texts on stdout until that fails, which ends the showing and nothing else."""

    def __init__(self) -> None:
        self.is_lost = False

    def __call__(self, text: str) -> str:
        """Print; returns why nothing more can be shown, the first time that it fails for a reason worth telling."""
        if self.is_lost:
            return ""
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head` has seen enough
            self._give_up()
        except (OSError, ValueError) as error:
            self._give_up()
            return f"{getattr(error, 'strerror', None) or error}"
        return ""

    def _give_up(self) -> None:
        self.is_lost = True
        drop_stdout()


def drop_stdout() -> None:
    """Send what is still buffered, and all that follows, nowhere: else the interpreter fails on it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDOUT)
        os.close(nowhere)
