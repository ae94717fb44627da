"""The index of a sharded safetensors checkpoint, built from the headers alone. Without torch.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_dist.errors import CheckpointError

DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Torch's names of the dtypes of safetensors, and the bytes of a number."""
_MAX_HEADER_BYTES = 100_000_000
_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``offset`` is from the start of the file, in bytes. `dtype` is torch's name."""

    name: str
    file: Path
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class CheckpointIndex:
    """All tensors of a checkpoint directory by name."""

    def __init__(self, directory: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.directory = directory
        self.tensors = tensors

    @staticmethod
    def read(directory: str | Path) -> CheckpointIndex:
        """Read the headers of every weight file.

        Raises:
            CheckpointError: no weights, a file of the index is missing, a file is truncated or malformed.
        """
        root = Path(directory)
        if not root.is_dir():
            raise CheckpointError(f"{root}: is not a directory: --model takes a checkpoint directory with config.json")
        tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(root):
            for tensor in _read_header(file):
                tensors[tensor.name] = tensor
        return CheckpointIndex(root, tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: the weights lack the tensor {name!r}") from None


def _weight_files(root: Path) -> list[Path]:
    index_path = root / _INDEX_NAME
    if index_path.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index_path.read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{index_path}: is not a safetensors index ({error})") from None
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index_path}: names the weight file {name!r} outside its directory")
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{root}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:3])}"
            )
        return [root / name for name in names]
    if (root / _SINGLE_NAME).is_file():  # what else lies there may be an adapter, or the same weights once more
        return [root / _SINGLE_NAME]
    files = sorted(root.glob("*.safetensors"))
    if not files:
        hint = (
            " (pickled .bin weights are never loaded: convert them to safetensors)" if any(root.glob("*.bin")) else ""
        )
        raise CheckpointError(f"{root}: holds no *.safetensors file{hint}")
    return files


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: is truncated or no safetensors file: {size} bytes, header of {length} bytes"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{file}: is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: is no safetensors file: its header is not a mapping")
    return [_entry(file, size, 8 + length, name, value) for name, value in header.items() if name != "__metadata__"]


def _entry(file: Path, size: int, start: int, name: str, value: Any) -> StoredTensor:
    try:
        dtype, itemsize = DTYPES[value["dtype"]]
        shape = tuple(int(extent) for extent in value["shape"])
        begin, end = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{file}: the header entry of {name!r} is malformed or of an unknown dtype") from None
    count = 1
    for extent in shape:
        count *= extent
    if begin < 0 or any(extent < 0 for extent in shape) or end - begin != count * itemsize:
        raise CheckpointError(
            f"{file}: {name!r} of shape {list(shape)} needs {count * itemsize} bytes, its header says {end - begin}"
        )
    if start + end > size:
        raise CheckpointError(f"{file}: is truncated: {name!r} ends at byte {start + end}, the file has {size}")
    return StoredTensor(name, file, dtype, itemsize, shape, start + begin, end - begin)
