"""Which tensors may travel, how they look as bytes, and the one way in which they are summed.

MPI only ever sees bytes; all arithmetic is torch's. That closes the trap of bfloat16, which MPI libraries either
refuse or add up as if it were something else, and it makes the order of summation ours: rank 0 first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

ReduceOp = Literal["sum", "max"]

_LOW_FLOATS = frozenset({torch.float16, torch.bfloat16})
_EXACT_SUMS = frozenset({torch.float64, torch.float32, torch.uint8, torch.int8, torch.int32, torch.int64})
_MOVES_ONLY = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.bool})
SUPPORTED = _LOW_FLOATS | _EXACT_SUMS | _MOVES_ONLY


def check_movable(tensor: Tensor, operation: str, *, has_gpu: bool = False) -> None:
    """Refuse what no transport of a group carries; `has_gpu` says that it carries GPU tensors too.

    Raises:
        TypeError: a dtype outside `SUPPORTED`, or a device that the group does not serve.
    """
    if tensor.dtype not in SUPPORTED:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in SUPPORTED))
        raise TypeError(f"{operation} cannot carry {tensor.dtype}; it carries {names}")
    if not (tensor.is_cpu or (has_gpu and tensor.is_cuda)):
        raise TypeError(f"{operation} got a tensor on {tensor.device}; only CPU tensors are carried: call .cpu() first")


def check_reducible(dtype: torch.dtype, op: str, operation: str) -> None:
    """Refuse reductions that have no exact meaning.

    Raises:
        TypeError: the dtype can be moved but not reduced.
        ValueError: an `op` other than ``sum`` and ``max``.
    """
    if op not in ("sum", "max"):
        raise ValueError(f"{operation} knows the operations 'sum' and 'max', not {op!r}")
    if dtype in _MOVES_ONLY:
        raise TypeError(f"{operation} cannot reduce {dtype}: convert it first, for example to bfloat16 or int32")


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as uint8 [bytes]; shares its storage."""
    return tensor.detach().view(-1).view(torch.uint8)


def accumulates_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` are kept in: float32 for the 16-bit floats."""
    return torch.float32 if dtype in _LOW_FLOATS else dtype


def needs_scratch(dtype: torch.dtype, op: str, count: int) -> bool:
    """Whether `reduce_rows` of `count` rows wants a scratch row: two 16-bit numbers are already rounded only once."""
    return op == "sum" and dtype in _LOW_FLOATS and count > 2


def reduce_rows(rows: Sequence[Tensor], op: str, out: Tensor, scratch: Tensor | None = None) -> None:
    """`out` = the reduction of `rows` (two or more, all of one shape) in their order, rounded once.

    `out` must not be one of the rows when there are more than two. `scratch` is float32 of the rows' shape, needed
    where `needs_scratch` says so.
    """
    if scratch is not None:
        scratch.copy_(rows[0])
        for row in rows[1:]:
            scratch.add_(row)
        out.copy_(scratch)
        return
    combine = torch.add if op == "sum" else torch.maximum
    combine(rows[0], rows[1], out=out)
    for row in rows[2:]:
        combine(out, row, out=out)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A new tensor, on the CPU by default, that may be kept and written in any grad mode.

    One made under inference mode may not.
    """
    with torch.inference_mode(False):
        return torch.empty(tuple(shape), dtype=dtype, device=device)


class Scratch:
    """One buffer that grows and is used again, so that steady operation allocates nothing. On the CPU by default."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._bytes = empty([0], torch.uint8, device)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor [*shape]; valid until the next `take`."""
        count = 1
        for length in shape:
            count *= length
        needed = count * dtype.itemsize
        if self._bytes.numel() < needed:
            self._bytes = empty([needed], torch.uint8, self._device)
        return self._bytes[:needed].view(dtype).view(tuple(shape))
