"""Memory for what is large and read again and again: weights, keys and values."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from math import prod

import torch

_HUGE_PAGE = 2 << 20
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def fresh_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory when they are first touched, on huge pages as far as the kernel has them.

    Huge pages are a tenth faster to stream and several times faster to touch first (docs/performance.md).
    """
    count = prod(shape)
    size = count * dtype.itemsize
    if size < _HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=_FLAGS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % _HUGE_PAGE
    if _ADVICE is not None:
        with suppress(OSError):  # a kernel without huge pages
            # Only pages that are used whole: the rest would take memory for nothing.
            pages.madvise(_ADVICE, start, size - size % _HUGE_PAGE)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start).view(shape)
