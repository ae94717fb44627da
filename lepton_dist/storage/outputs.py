"""Small files that a command writes at its end, and refuses before it begins where they cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

from lepton_dist.errors import OutputError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make the folder of a file that is to be written, and see whether the file could be; none is left behind.

    Raises:
        OutputError: it could not.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise OutputError(f"{path}: cannot be written: it is a directory")
        # Asking beats trying where a file must not be left behind, but root may write whatever its mode says.
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise OutputError(f"{path}: cannot be written: no permission")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def write_output(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; its folder is made.

    Raises:
        OutputError: it cannot be written.
    """
    check_writable(path)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
