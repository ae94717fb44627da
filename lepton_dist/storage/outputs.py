"""Files that a command writes: refused before it begins where they cannot be written or would destroy what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lepton_dist.errors import OutputError
from lepton_dist.files import is_same_file
from lepton_dist.storage.durable import replace_file
from lepton_dist.storage.fingerprint import model_files

PathLike = str | os.PathLike[str]


def refuse_overwriting(written: Mapping[str, PathLike | None], read: Mapping[str, PathLike | None]) -> None:
    """See that nothing that is written is a file that is read, or is written under another name.

    Args:
        written: paths by what they are for, such as ``"--output"``; None where there is none.
        read: the same for inputs; of a directory every file of the model in it.

    Raises:
        OutputError: names both. Links of either kind are seen through.
    """
    outputs = [(what, Path(path)) for what, path in written.items() if path is not None]
    inputs = list(_files(read))
    for index, (what, path) in enumerate(outputs):
        for other_what, other in (*inputs, *outputs[:index]):
            if is_same_file(path, other):
                raise OutputError(
                    f"{path}: {what} would overwrite {other_what} ({other}): both name the same file; "
                    f"give {what} another name"
                )


def _files(read: Mapping[str, PathLike | None]) -> Iterator[tuple[str, Path]]:
    for what, name in read.items():
        path = Path(name) if name is not None else None
        if path is not None and path.is_dir():
            yield from ((f"a file of {what}", file) for file in model_files(path))
        elif path is not None:
            yield what, path


def check_writable(path: PathLike) -> None:
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


def write_output(path: PathLike, content: str | bytes) -> None:
    """Write a file whole, in one step where it is a regular one; its folder is made, links are followed.

    Raises:
        OutputError: it cannot be written; a regular file is then as it was.
    """
    check_writable(path)
    data = content.encode() if isinstance(content, str) else content
    target = Path(path).resolve()
    try:
        if target.exists() and not target.is_file():  # a device or a pipe, such as /dev/stdout
            target.write_bytes(data)
        else:
            replace_file(target, [data])
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
