"""One writer at a time for an output file: a lock that the system drops when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path

from lepton_dist.errors import OutputError
from lepton_dist.storage.output_files import lock_path
from lepton_dist.telemetry.stopwatch import Stopwatch

_POLL_S = 0.05
# What a file system answers that has no such locks (Lustre without its flock option, some NFS).
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})

_LOCK_TEXT = re.compile(r"(\d+ on \S+\n)?")


class OutputLock:
    """Holds the lock until `release`. The lock file is removed then; a dead holder leaves it behind, unlocked.

    Attributes:
        is_exclusive: False where the file system has no locks, so that a second writer would go unseen.
    """

    def __init__(self, path: Path, descriptor: int, *, is_exclusive: bool) -> None:
        self._path = path
        self._descriptor = descriptor
        self.is_exclusive = is_exclusive

    @classmethod
    def acquire(cls, output: Path, *, wait_s: float) -> OutputLock:
        """Take an output's lock, ``OUTPUT.lock``, waiting up to `wait_s` seconds for a holder that may be dying.

        Raises:
            OutputError: another process still holds it (names the process and its host); or what lies there is no
                lock of a run.
            OSError: the lock file cannot be written.
        """
        path = lock_path(output)
        stopwatch = Stopwatch()
        while True:
            descriptor = _opened(path, output)
            try:
                lock = cls._try(path, descriptor)
                if lock is not None:
                    return lock
                holder = _holder(descriptor).strip() or "unknown"
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if stopwatch.look() >= wait_s:
                raise OutputError(
                    f"{output}: another run is writing this output (process {holder}), still after {wait_s:g} s; "
                    "wait for it, or end it, or choose another output"
                )
            time.sleep(_POLL_S)

    @classmethod
    def _try(cls, path: Path, descriptor: int) -> OutputLock | None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return cls(path, descriptor, is_exclusive=False)
        # The holder before may have removed the file between our opening and locking it: then this lock locks nothing.
        try:
            is_current = os.path.samestat(os.fstat(descriptor), path.stat())
        except FileNotFoundError:
            is_current = False
        if not is_current:
            return None
        if not _LOCK_TEXT.fullmatch(_holder(descriptor)):
            raise OutputError(f"{path}: exists, and is not the lock of a run: move it away, or choose another output")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return cls(path, descriptor, is_exclusive=True)

    def release(self) -> None:
        """Let the next writer in; removes the lock file while it is still locked."""
        if self._descriptor >= 0:
            # A lock file that cannot be removed does no harm: it is the lock on it that counts, and closing drops that.
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1


def _opened(path: Path, output: Path) -> int:
    """The lock file, made where it is absent; never what a link leads to.

    Raises:
        OutputError: it is a link, or another user's.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OutputError(f"{path}: is a link, where the lock of {output} would be: remove it") from None
        if error.errno == errno.EACCES and path.exists():
            raise OutputError(
                f"{path}: belongs to another user, whose run may be writing {output}: if none is, remove it"
            ) from None
        raise


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 300, 0).decode("utf-8", "replace")
