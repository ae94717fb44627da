"""The balancer's log of a run, in a file from which its decisions can be replayed (`coordinator/decisions.py`)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from lepton_dist.coordinator.decisions import FIRST_BYTES, Write
from lepton_dist.errors import OutputError
from lepton_dist.telemetry.voice import notice

_PRIVATE = 0o600  # it holds the ids of rows


@contextmanager
def decision_log(path: str | None) -> Iterator[Write | None]:
    """What takes the lines of a log in a new file `path`; None where no log is wanted.

    A disk that fails meanwhile ends the log, not the run. What is told after the run's end, while replicas still answer
    and the session closes, is left out: nothing is decided any more.

    Raises:
        OutputError: the file cannot be written, or holds something else than a decision log.
    """
    if path is None:
        yield None
        return
    log = _Log(_opened(path), path)
    try:
        yield log.write
    finally:
        log.close()


def _opened(path: str) -> TextIO:
    """An empty file for a log, or an earlier log emptied; no other file is touched."""
    try:
        # O_NONBLOCK: a named pipe would wait for its reader.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, _PRIVATE)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a device, such as /dev/null
            return os.fdopen(descriptor, "w", encoding="utf-8")
        if os.pread(descriptor, len(FIRST_BYTES), 0) not in (b"", FIRST_BYTES):
            os.close(descriptor)
            raise OutputError(f"{path}: exists, and is no decision log: name another file, or move it away")
        os.ftruncate(descriptor, 0)
    except OSError as error:
        raise OutputError(f"{path}: the decision log cannot be written: {error.strerror}") from None
    return os.fdopen(descriptor, "w", encoding="utf-8")


class _Log:
    def __init__(self, stream: TextIO, path: str) -> None:
        self._stream, self._path = stream, path
        self._is_over = False

    def write(self, line: str) -> None:
        if not self._is_over:
            try:
                self._stream.write(line)
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        try:
            self._stream.close()  # writes what is left
        except OSError as error:
            if not self._is_over:
                self._fail(error)
        self._is_over = True

    def _fail(self, error: OSError) -> None:
        self._is_over = True
        notice(f"warning: the decision log ends here: {self._path}: {error.strerror}")
