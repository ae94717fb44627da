"""Finding the compiled kernels: built when the package was installed, where a C compiler was found."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or do not fit this machine.

    Import torch first: the library then runs on torch's OpenMP threads, and no second pool fights over the cores.
    """
    spec = find_spec("lepton_dist.kernels.cpu._native")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:
        return None
