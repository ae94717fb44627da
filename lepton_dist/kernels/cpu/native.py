"""Finding the compiled kernels: built when the package was installed, where a C compiler was found."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

import torch

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The numbers by which the kernels know the dtypes of activations and caches."""


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's values begin, as the kernels take it; NULL for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def has_heads_side_by_side(x: torch.Tensor) -> bool:
    """Whether each row of x [tokens, heads, head_dim] is contiguous, whatever lies between rows."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or do not fit this machine.

    Torch is imported first: the library then runs on torch's OpenMP threads, and no second pool fights over the cores.
    """
    spec = find_spec("lepton_dist.kernels.cpu._native")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    return library if library.lepton_is_supported() else None
