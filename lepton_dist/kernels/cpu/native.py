"""Finding the compiled kernels: built when the package was installed, where a C compiler was found."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

import torch

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The numbers by which the kernels know the dtypes of activations and caches."""


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
