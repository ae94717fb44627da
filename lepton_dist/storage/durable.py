"""Small steps that survive a crash: whole writes, files replaced in one step, faults of the disk told apart."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from lepton_dist.errors import LeptonError, OutputError, StoppedEarly

# The disk is full (or a quota or file size limit is reached) or failing: not the command's fault, and it may pass.
_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_NO_SUCH_CALL = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def output_fault(error: OSError, path: Path, done: str) -> LeptonError:
    """The error for a failed operation on an output file: `StoppedEarly` where waiting or space helps.

    Args:
        done: how far the run came, for the message.
    """
    reason = error.strerror or type(error).__name__
    if error.errno in _DISK_FAULTS:
        return StoppedEarly(f"{path}: {reason} ({done}); make room and give the same command again to resume")
    return OutputError(f"{path}: the output cannot be written: {reason}")


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, however many calls that takes.

    Raises:
        OSError: some of it may have been written.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def replace_file(
    path: Path,
    chunks: Iterable[bytes],
    *,
    mode: int | None = None,
    is_durable: bool = True,
    syncs_directory: bool = True,
) -> None:
    """Put a new file in the place of `path` in one step: after a crash the old one is there, or the whole new one.

    Each wait for the disk may take long: a file that can be made again need not be `is_durable`, and of several in one
    directory the last one may sync that for all.

    It has the `mode` given, else that of the old file, else what the umask leaves. A link in its place is replaced, not
    followed.

    Raises:
        OSError: the old file is as it was.
    """
    draft = draft_of(path)
    if mode is None and path.is_file():
        mode = stat.S_IMODE(path.stat().st_mode)
    # What lies there is a killed run's, or a link that somebody planted: it is removed, never written into.
    draft.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(draft, flags, 0o666 if mode is None else 0o600)
    try:
        try:
            if mode is not None:
                os.fchmod(descriptor, mode)
            for chunk in chunks:
                write_all(descriptor, chunk)
            if is_durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if is_durable and syncs_directory:
        sync_directory(path.parent)


def remove_draft(path: Path) -> None:
    """Remove what a `replace_file` that was killed half-way has left behind.

    Raises:
        OSError: it cannot be removed.
    """
    draft_of(path).unlink(missing_ok=True)


def draft_of(path: Path) -> Path:
    """Where `replace_file` writes before it puts the file in its place."""
    return path.with_name(path.name + ".lepton-draft")


def sync_directory(directory: Path) -> None:
    """Make the creation, renaming or removal of a file in `directory` durable."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a folder to drop files into, which this user may not list
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network and user-space file systems refuse this for directories; the network ones do it by themselves.
        if error.errno not in _NO_SUCH_CALL:
            raise
    finally:
        os.close(descriptor)
