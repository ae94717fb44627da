"""The header of a safetensors file, read as strictly as the reference library reads it. Without torch.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lepton_dist.errors import CheckpointError
from lepton_dist.files import open_regular

DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4_e2m1", 4),
}
"""Torch's names of the dtypes of safetensors (the last have none in torch), and the bits of a number."""
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 200_000
_METADATA = "__metadata__"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``offset`` is from the start of the file, in bytes. `dtype` is torch's name."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def itemsize(self) -> int:
        """Bytes of a number, of those dtypes that fill whole bytes."""
        return BITS[self.dtype] // 8


BITS: Mapping[str, int] = dict(DTYPES.values())
"""Bits of a number, by torch's names."""


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of its header.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or its header is malformed: not the JSON that it must
            be, of a size beyond `MAX_HEADER_BYTES` or `MAX_TENSORS`, or its tensors overlap, leave holes or do not fill
            the file.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file}: is truncated or no safetensors file: {size} bytes, header of {length} bytes"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: has a header of {length} bytes; {MAX_HEADER_BYTES} are read at most: split the weights "
                    "over several files"
                )
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    header = _parsed(file, text)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{file}: names {len(header)} tensors; {MAX_TENSORS} are read at most")
    metadata = header.pop(_METADATA, None)
    is_plain = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not is_plain:
        raise CheckpointError(f"{file}: the header's {_METADATA} must map names to strings")
    start = 8 + length
    tensors = [_entry(file, start, name, value) for name, value in header.items()]
    _check_cover(file, tensors, start, size)
    return tensors


def _parsed(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise ValueError("a name stands twice in it")
        return mapping

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise CheckpointError(f"{file}: is no safetensors file: its header nests too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: is no safetensors file: its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: is no safetensors file: its header is not a mapping")
    return header


def _entry(file: Path, start: int, name: str, value: Any) -> StoredTensor:
    entry: dict[str, Any] = value if isinstance(value, dict) else {}
    kind, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(kind, str) or kind not in DTYPES or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{file}: the header entry of {name[:200]!r} is malformed or of an unknown dtype")
    dtype, bits = DTYPES[kind]
    begin, end = offsets
    needed, rest = divmod(prod(shape) * bits, 8)
    if rest or end - begin != needed:
        raise CheckpointError(
            f"{file}: {name[:200]!r} of shape {list(shape)} needs {needed} bytes, its header says {end - begin}"
        )
    return StoredTensor(name, file, dtype, tuple(shape), start + begin, needed)


def _counts(values: Any) -> list[int] | None:
    """A list of whole numbers from 0 on; None for anything else."""
    is_list = isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
    return values if is_list else None


def _check_cover(file: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """See that the tensors lie one behind another and fill the file."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            how = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(
                f"{file}: {tensor.name[:200]!r} {how}: it begins at byte {tensor.offset}, not at {end}"
            )
        end += tensor.num_bytes
        if end > size:
            raise CheckpointError(
                f"{file}: is truncated: {tensor.name[:200]!r} ends at byte {end}, the file has {size}"
            )
    if end != size:
        raise CheckpointError(f"{file}: has {size} bytes, but its tensors end at byte {end}")
