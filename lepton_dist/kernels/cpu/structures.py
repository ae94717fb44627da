"""The structures that Python fills in for C: each is a mirror of one in structures.h. Without torch."""

from __future__ import annotations

import ctypes
from struct import Struct

ABI = 3
"""Raised with every change of a structure or of a function's arguments, here and in structures.h."""

PRODUCTS = ("qkv", "output", "up", "down")
"""The matmuls of a layer."""

_Fields = tuple[tuple[str, type], ...]


def _pointers(*names: str) -> _Fields:
    return tuple((name, ctypes.c_void_p) for name in names)


def _numbers(*names: str) -> _Fields:
    return tuple((name, ctypes.c_int64) for name in names)


class PanelPlace(ctypes.Structure):
    """`struct panels`."""

    _fields_ = (*_pointers("bytes", "scales"), *_numbers("in_", "group"))


class MatmulCall(ctypes.Structure):
    """`struct matmul_call`."""

    _fields_ = (
        *_pointers("x", "y", "weights", "scales"),
        *_numbers("rows", "in_", "out", "x_stride", "y_stride", "x_kind", "y_kind", "threads", "group"),
    )


class Layer(ctypes.Structure):
    """`struct layer`."""

    _fields_ = (
        *_pointers(*(f"{name}_{part}" for name in PRODUCTS for part in ("matmul", "call"))),
        *_pointers("attention_norm", "mlp_norm", "qkv_bias", "up_bias", "q_norm", "k_norm"),
        *_numbers("hidden", "heads", "kv_heads", "dim", "ffn", "kind", "window"),
        *((name, ctypes.c_float) for name in ("attention_eps", "mlp_eps", "head_eps")),
    )


class RowRun(ctypes.Structure):
    """`struct row_run`."""

    _fields_ = (
        *_pointers("pack"),
        ("to", PanelPlace),
        *_numbers("kind", "file", "offset", "row_bytes", "skipped", "kept", "first", "rows", "step", "pieces_before"),
    )


class RowLoading(ctypes.Structure):
    """`struct row_loading`."""

    _fields_ = (
        ("runs", ctypes.POINTER(RowRun)),
        *_numbers("num_runs", "num_pieces", "next", "failed", "error"),
    )


_multiply_arguments = Struct("9q")
_half_arguments = Struct("20q")
_paged_call = Struct("18q")
pack_multiply, pack_half, pack_paged = _multiply_arguments.pack, _half_arguments.pack, _paged_call.pack
"""`struct multiply_arguments`, `struct half_arguments` and `struct paged_call` of addresses and numbers, 0 for NULL."""


def expected() -> list[int]:
    """What `lepton_structures` of support.c must say: the number, then the sizes."""
    mirrors = (PanelPlace, MatmulCall, Layer, RowRun, RowLoading)
    packed = _multiply_arguments.size, _half_arguments.size, _paged_call.size
    return [ABI, *(ctypes.sizeof(mirror) for mirror in mirrors), *packed]
