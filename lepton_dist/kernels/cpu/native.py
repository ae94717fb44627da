"""Finding the compiled kernels: built when the package was installed, where a C compiler was found. Without torch."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from enum import IntEnum
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lepton_dist.kernels.cpu.structures import expected

KINDS = {"float32": 0, "bfloat16": 1}
"""The numbers by which the kernels know the dtypes of activations, caches and stored weights."""

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "b": ctypes.c_char_p}

# Arguments as in the C files. Told once: a call then takes plain numbers, which is half of what it costs.
_SIGNATURES = {
    **{f"lepton_pack_{kind}{level}": "ppiiii" for kind in ("bf16", "int8", "int4") for level in ("", "_512")},
    "lepton_load_rows": "pi",
    "lepton_rms_norm": "ppppiiifi",
    "lepton_norm_heads": "pppiiiiiifi",
    "lepton_gated_silu": "ppiiii",
    "lepton_rotate": "pppiiiiiii",
    "lepton_write_cache": "pppppiiiiiiiii",
    "lepton_arg_max": "pppiii",
    "lepton_multiply": "b",
    "lepton_paged_attention": "b",
    "lepton_attention_half": "b",
    "lepton_mlp_half": "ppppii",
}


class VectorLevel(IntEnum):
    """The instructions that a kernel is written for, as in vector.h."""

    NONE = 0
    AVX2 = 1
    AVX512 = 2
    """With VNNI and BF16."""


def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or do not fit this machine or this code."""
    return _loaded()[0]


def native_problem() -> str:
    """Why compiled kernels that were built are not used, and what to do; empty where they are used, or not built."""
    return _loaded()[1]


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    spec = find_spec("lepton_dist.kernels.cpu._native")
    if spec is None or spec.origin is None:
        return None, ""
    _load_openmp()
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"the compiled kernels do not load, torch's are used: {error}"
    if problem := _mismatch(library):
        return None, (
            f"the compiled kernels in {spec.origin} are of another version of lepton_dist ({problem}), torch's slower "
            "ones are used: build them again with launch/environment, or with pip install of this version"
        )
    if library.lepton_vector_level() == VectorLevel.NONE:
        return None, ""
    for name, arguments in _SIGNATURES.items():
        if hasattr(library, name):  # an older compiler leaves those for AVX-512 out
            getattr(library, name).argtypes = [_TYPES[letter] for letter in arguments]
    return library, ""


def _mismatch(library: ctypes.CDLL) -> str:
    """How the library's structures differ from those that Python fills in; empty where they are the same."""
    wanted = expected()
    try:
        number = ctypes.c_int64.in_dll(library, "lepton_structures").value
    except ValueError:
        return f"it has no number, this code wants {wanted[0]}"
    if number != wanted[0]:  # what follows it may be shorter
        return f"its number is {number}, this code wants {wanted[0]}"
    found = list((ctypes.c_int64 * len(wanted)).in_dll(library, "lepton_structures"))
    return "" if found == wanted else f"its structures have {found[1:]} bytes, this code's {wanted[1:]}"


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
