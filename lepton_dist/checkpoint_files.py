"""The small files of a checkpoint, read so that whatever is wrong with one is told with its name.

On the ground floor, beside `errors`: the rooms that know the weights, the model and the text all read such files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lepton_dist.errors import CheckpointError
from lepton_dist.files import open_regular

_MAX_BYTES = 512 << 20


def read_checkpoint_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        CheckpointError: it is absent, cannot be read, or is far larger than such a file can be.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > _MAX_BYTES:
                raise CheckpointError(f"{path}: has {size} bytes; a file of this kind has {_MAX_BYTES} at most")
            return stream.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_checkpoint_text(path: Path) -> str:
    """The text of a file.

    Raises:
        CheckpointError: as `read_checkpoint_bytes`, or it is not UTF-8.
    """
    try:
        return read_checkpoint_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: as `read_checkpoint_text`; or it is not JSON, nests too deep, or is not an object.
    """
    return parse_json_object(path, read_checkpoint_text(path))


def parse_json_object(path: Path, text: str | bytes) -> dict[str, Any]:
    """The JSON object in a part of a file, such as the header of its weights.

    Raises:
        CheckpointError: it is not JSON, nests too deep, or is not an object.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{path}: nests too deep to be read as JSON") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content
