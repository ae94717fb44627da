"""Finding the compiled kernels: built when the package was installed, where a C compiler was found."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from importlib.util import find_spec

import torch

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The numbers by which the kernels know the dtypes of activations and caches."""

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}

# Arguments as in the C files. Told once: a call then takes plain numbers, which is half of what it costs.
_SIGNATURES = {
    "lepton_pack_bf16": "piipi",
    "lepton_pack_int8": "piiippi",
    "lepton_pack_int4": "piiiipi",
    "lepton_pack_bf16_512": "piipi",
    "lepton_pack_int8_512": "piiippi",
    "lepton_pack_int4_512": "piiiipi",
    "lepton_rms_norm": "ppppiiifi",
    "lepton_gated_silu": "ppiiii",
    "lepton_rotate": "pppiiiiiii",
    "lepton_write_cache": "pppppiiiiiiii",
    "lepton_arg_max": "pppiii",
    "lepton_attention_half": "pppppii",
    "lepton_mlp_half": "ppppii",
}


def has_heads_side_by_side(x: torch.Tensor) -> bool:
    """Whether each row of x [tokens, heads, head_dim] is contiguous, whatever lies between rows."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


class VectorLevel(IntEnum):
    """The instructions that a kernel is written for, as in vector.h."""

    NONE = 0
    AVX2 = 1
    AVX512 = 2
    """With VNNI and BF16."""


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
    if library.lepton_vector_level() == VectorLevel.NONE:
        return None
    for name, arguments in _SIGNATURES.items():
        if hasattr(library, name):  # an older compiler leaves those for AVX-512 out
            getattr(library, name).argtypes = [_TYPES[letter] for letter in arguments]
    return library


def work_alone() -> None:
    """Let what this thread computes wake no others; without the compiled kernels, nothing changes.

    Not `torch.set_num_threads`, which would speak for all threads of the process.
    """
    torch.get_num_threads()  # torch sets a new thread's number when it is first asked for
    library = native_library()
    if library is not None:
        library.lepton_work_alone()


@cache
def vector_level() -> VectorLevel:
    """What the kernels may use of this machine."""
    library = native_library()
    return VectorLevel.NONE if library is None else VectorLevel(library.lepton_vector_level())
