"""Why a model gives no numbers: the first of its weights that holds a NaN or an infinity. Without torch."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from lepton_dist.errors import CheckpointError
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.storage.safetensors_header import StoredTensor

_PIECE_BYTES = 16 << 20
# All bits of the exponent (for float8_e4m3fn of the exponent and the mantissa) are set in what is no finite number.
_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "float64": (np.uint64, 0x7FF0000000000000),
    "float32": (np.uint32, 0x7F800000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float8_e4m3fn": (np.uint8, 0x7F),
    "float8_e5m2": (np.uint8, 0x7C),
}


def broken_model(blueprint: Blueprint, compute: str, *, limit_s: float = 60.0) -> CheckpointError:
    """The error of a model whose logits are never numbers; reads its weights for `limit_s` seconds at most.

    `compute` is the dtype that it is computed in.
    """
    begun = (
        f"{blueprint.index.directory}: the model gives no numbers, whatever the prompt: its logits are NaN or infinite"
    )
    end_s = time.monotonic() + limit_s
    for stored in _tensors(blueprint):
        try:
            place = _first_not_finite(stored, end_s)
        except TimeoutError:
            return CheckpointError(f"{begun}. No broken weight was found in {limit_s:g} s of reading")
        except OSError as error:
            return CheckpointError(f"{begun}. {stored.file} cannot be read: {error.strerror}")
        if place is not None:
            index = ", ".join(map(str, np.unravel_index(place, stored.shape)))
            return CheckpointError(
                f"{begun}. The tensor {stored.name!r} in {stored.file.name} holds a value that is no number, at "
                f"[{index}]: get the checkpoint again"
            )
    return CheckpointError(
        f"{begun}. Every weight is a finite number, so values overflow in {compute}: use --dtype "
        f"{'float32' if compute == 'bfloat16' else 'bfloat16 or float32'}"
    )


def _tensors(blueprint: Blueprint) -> Iterator[StoredTensor]:
    """What the model uses of its checkpoint, in the order of use."""
    names = (
        part.tensor
        for parameter in blueprint.table.of_stage(range(blueprint.config.shape.num_layers))
        for part in parameter.parts
    )
    return (blueprint.index[name] for name in dict.fromkeys(names))


def _first_not_finite(stored: StoredTensor, end_s: float) -> int | None:
    """The place of the first value that is NaN or infinite; None where there is none.

    Raises:
        TimeoutError: the clock has passed `end_s`.
    """
    if stored.dtype not in _NOT_FINITE:
        return None
    kind, bits = _NOT_FINITE[stored.dtype]
    mask = kind(bits)
    with stored.file.open("rb") as stream:
        stream.seek(stored.offset)
        for start in range(0, stored.num_bytes, _PIECE_BYTES):
            if time.monotonic() > end_s:
                raise TimeoutError
            values = np.frombuffer(stream.read(min(_PIECE_BYTES, stored.num_bytes - start)), dtype=kind)
            found = (values & mask) == mask
            if found.any():
                return start // stored.itemsize + int(found.argmax())
    return None
