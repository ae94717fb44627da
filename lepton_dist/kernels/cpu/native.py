"""Finding the compiled kernels: built when the package was installed, where a C compiler was found. Without torch."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from enum import IntEnum
from functools import cache
from importlib.util import find_spec
from pathlib import Path

KINDS = {"float32": 0, "bfloat16": 1}
"""The numbers by which the kernels know the dtypes of activations, caches and stored weights."""

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}

# Arguments as in the C files. Told once: a call then takes plain numbers, which is half of what it costs.
_SIGNATURES = {
    **{f"lepton_pack_{kind}{level}": "ppiiii" for kind in ("bf16", "int8", "int4") for level in ("", "_512")},
    "lepton_load_rows": "pi",
    "lepton_rms_norm": "ppppiiifi",
    "lepton_gated_silu": "ppiiii",
    "lepton_rotate": "pppiiiiiii",
    "lepton_write_cache": "pppppiiiiiiii",
    "lepton_arg_max": "pppiii",
    "lepton_attention_half": "pppppii",
    "lepton_mlp_half": "ppppii",
}


class VectorLevel(IntEnum):
    """The instructions that a kernel is written for, as in vector.h."""

    NONE = 0
    AVX2 = 1
    AVX512 = 2
    """With VNNI and BF16."""


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or do not fit this machine."""
    spec = find_spec("lepton_dist.kernels.cpu._native")
    if spec is None or spec.origin is None:
        return None
    _load_openmp()
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


@cache
def vector_level() -> VectorLevel:
    """What the kernels may use of this machine."""
    library = native_library()
    return VectorLevel.NONE if library is None else VectorLevel(library.lepton_vector_level())


def address_of(function: object) -> int:
    """Where a compiled function lies, for structures that C reads."""
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None  # of a function that was found
    return address


def _load_openmp() -> None:
    """Torch's own OpenMP, if torch has not brought it yet: two pools of threads would fight over the cores."""
    spec = None if "torch" in sys.modules else find_spec("torch")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        with suppress(OSError):  # a torch that is built otherwise
            ctypes.CDLL(str(Path(folder) / "lib" / "libgomp.so.1"))
