"""Small steps that survive a crash: whole writes, files replaced in one step, faults of the disk told apart."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from lepton_dist.errors import LeptonError, OutputError, StoppedEarly

# The disk is full (or a quota or file size limit is reached) or failing: not the command's fault, and it may pass.
_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


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


def replace_file(path: Path, chunks: Iterable[bytes], *, mode: int) -> None:
    """Put a new file in the place of `path` in one step: after a crash the old one is there, or the whole new one.

    Raises:
        OSError: the old file is as it was.
    """
    draft = _draft(path)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            # A draft left behind by a killed run keeps its own mode, so it is set here and not at creation.
            os.fchmod(descriptor, mode)
            for chunk in chunks:
                write_all(descriptor, chunk)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_draft(path: Path) -> None:
    """Remove what a `replace_file` that was killed half-way has left behind.

    Raises:
        OSError: it cannot be removed.
    """
    _draft(path).unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(path.name + ".lepton-draft")


def sync_directory(directory: Path) -> None:
    """Make the creation, renaming or removal of a file in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse this for directories; they do it by themselves.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
