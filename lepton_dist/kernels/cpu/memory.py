"""Memory for what is large and read again and again: weights, keys and values."""

from __future__ import annotations

from math import prod

import torch

from lepton_dist.kernels.cpu.pages import HUGE_PAGE, Pages


def fresh_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory when they are first touched; what is as large as a huge page lies in `Pages`."""
    count = prod(shape)
    if count * dtype.itemsize < HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype)
    pages = Pages(count * dtype.itemsize)
    return torch.frombuffer(pages.buffer, dtype=dtype, count=count, offset=pages.start).view(shape)
