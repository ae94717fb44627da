"""The balancer's log of a run, in a file from which its decisions can be replayed (`coordinator/decisions.py`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from lepton_dist.coordinator.decisions import Write
from lepton_dist.errors import OutputError
from lepton_dist.runtime.opening import notice

_PRIVATE = 0o600  # it holds the ids of rows


@contextmanager
def decision_log(path: str | None) -> Iterator[Write | None]:
    """What takes the lines of a log in a new file `path`; None where no log is wanted.

    A disk that fails meanwhile ends the log, not the run. What is told after the run's end, while replicas still answer
    and the session closes, is left out: nothing is decided any more.

    Raises:
        OutputError: the file cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _PRIVATE)
    except OSError as error:
        raise OutputError(f"{path}: the decision log cannot be written: {error.strerror}") from None
    log = _Log(os.fdopen(descriptor, "w", encoding="utf-8"), path)
    try:
        yield log.write
    finally:
        log.close()


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
