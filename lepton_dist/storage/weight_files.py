"""Weight files that stay open while they are read, and what is said of one that cannot be. Without torch."""

from __future__ import annotations

import os
from pathlib import Path

from lepton_dist.errors import CheckpointError
from lepton_dist.storage.safetensors_header import StoredTensor


class WeightFiles:
    """Files by their paths, each opened once; close them."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def open(self, file: Path) -> int:
        """The descriptor of a file.

        Raises:
            CheckpointError: it cannot be opened.
        """
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise unreadable(file, error.errno) from None
        return self._descriptors[file]

    def close(self) -> None:
        """Close all of them."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def unreadable(file: Path, error: int | None) -> CheckpointError:
    """What to raise for a file that the system does not let us read; `error` is its number."""
    return CheckpointError(f"{file}: cannot be read: {os.strerror(error or 0)}")


def truncated(stored: StoredTensor, missing_bytes: int) -> CheckpointError:
    """What to raise for a tensor whose file ends before it does, though its header had promised more."""
    return CheckpointError(f"{stored.file}: is truncated: {stored.name!r} ends {missing_bytes} bytes early")
