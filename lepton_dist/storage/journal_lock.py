"""One writer at a time for an output file: a lock that the system drops when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from lepton_dist.errors import OutputError

_POLL_S = 0.05
# What a file system answers that has no such locks (Lustre without its flock option, some NFS).
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})


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
            OutputError: another process still holds it; names the process and its host.
            OSError: the lock file cannot be written.
        """
        path = output.with_name(output.name + ".lock")
        deadline = time.monotonic() + wait_s
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                lock = cls._try(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if lock is not None:
                return lock
            holder = os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip() or "unknown"
            os.close(descriptor)
            if time.monotonic() >= deadline:
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
