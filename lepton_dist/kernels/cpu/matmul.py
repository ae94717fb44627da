"""Matmul over packed panels of weights, by the compiled kernels of `matmul_bf16.c`, `matmul_int8.c`, `matmul_int4.c`.

For CPUs without matrix instructions: torch's own bfloat16 and 8-bit products are reference loops there.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from lepton_dist.kernels.cpu.memory import lasting_zeros
from lepton_dist.kernels.cpu.native import KINDS, VectorLevel, native_library, vector_level
from lepton_dist.plan.precision import INT4_GROUPS

_PANEL = {VectorLevel.NONE: 16, VectorLevel.AVX2: 16, VectorLevel.AVX512: 32}
"""Output features of a panel, as in matmul.h and matmul_512.h."""
_QUANTUM = {VectorLevel.NONE: 2, VectorLevel.AVX2: 2, VectorLevel.AVX512: 4}
"""Neighbouring bytes of an int8 weight that are multiplied together."""


class MatmulCall(ctypes.Structure):
    """`struct matmul_call` of matmul.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "weights", "scales")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "in_", "out", "x_stride", "y_stride", "x_kind", "y_kind", "threads", "group")
        ),
    )


@dataclass(frozen=True)
class NativeProduct:
    """A matmul kernel's address, and that of the `struct matmul_call` that tells it of its weights."""

    function: int
    call: int


class PanelWeight:
    """A matrix [out, in] as panels: bfloat16, int8 (a scale an output feature) or int4 (a scale a group of a row).

    Made empty; `pack` takes its rows. `panels` are their bytes; `level` is that of the kernels, by default the highest
    of this machine. On AVX-512 panels of bfloat16 round `x` to bfloat16, those of int8 and int4 round it to 8 bits,
    with a scale for each 512 values.
    """

    def __init__(self, out_features: int, in_features: int, kind: str, level: VectorLevel | None = None) -> None:
        self.out_features, self.in_features = out_features, in_features
        level = vector_level() if level is None else level
        self.panel_rows = panel_rows(level)
        self._kind, self._group = kind, INT4_GROUPS.get(kind, 0)
        name = {"bfloat16": "bf16", "int8": "int8"}.get(kind, "int4") + ("_512" if level == VectorLevel.AVX512 else "")
        size = panel_bytes(kind, out_features, in_features, level)
        self.panels = lasting_zeros((size,), torch.uint8)
        library = _library()
        self._pack, self._function = (getattr(library, f"lepton_{verb}_{name}") for verb in ("pack", "matmul"))
        panels, scale_bytes = self.panels.data_ptr(), _scale_bytes(kind, out_features, level)
        self._row_bytes = (size - scale_bytes) // (-(-out_features // self.panel_rows) * self.panel_rows)
        self._call = MatmulCall(weights=panels, scales=panels + size - scale_bytes, in_=in_features, group=self._group)
        self._call.out = self._call.y_stride = out_features
        self._reference = ctypes.byref(self._call)
        self.native = native_product(self._function, self._call)

    @classmethod
    def of(cls, weight: torch.Tensor, kind: str, level: VectorLevel | None = None) -> PanelWeight:
        """A float matrix [out, in] as panels; float32 or bfloat16, which panels of bfloat16 need."""
        held = cls(weight.shape[0], weight.shape[1], kind, level)
        held.pack(0, weight.contiguous(), torch.get_num_threads())
        return held

    def pack(self, first: int, rows: torch.Tensor, threads: int = 1) -> None:
        """Take rows [count, in] from output feature `first` on; contiguous, of the dtypes of `of`.

        `first` is a multiple of `panel_rows`, and so is their number unless they are the last. Threads of the caller's
        may pack different rows at once.
        """
        panels, sizes = self._call.weights + first * self._row_bytes, rows.shape
        if self._kind == "bfloat16":
            self._pack(rows.data_ptr(), *sizes, panels, threads)
        elif self._kind == "int8":
            self._pack(rows.data_ptr(), KINDS[rows.dtype], *sizes, panels, self._call.scales + first * 4, threads)
        else:
            self._pack(rows.data_ptr(), KINDS[rows.dtype], *sizes, self._group, panels, threads)

    def matmul(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[tokens, in] float32 or bfloat16, channels side by side -> [tokens, out] in `dtype`, or that of `x`."""
        rows, dtype = x.shape[0], dtype or x.dtype
        y = torch.empty((rows, self.out_features), dtype=dtype)
        call = self._call
        call.x, call.y, call.rows, call.x_stride = x.data_ptr(), y.data_ptr(), rows, x.stride(0)
        call.x_kind, call.y_kind = KINDS[x.dtype], KINDS[dtype]
        call.threads = torch.get_num_threads()
        if self._function(self._reference):
            raise MemoryError(f"no memory for the activations of {rows} tokens x {self.in_features} channels")
        return y


def native_product(function: Any, call: ctypes.Structure) -> NativeProduct:
    """A kernel and a `struct matmul_call` as C sees them; keep the structure."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None  # of a function that was found
    return NativeProduct(address, ctypes.addressof(call))


def panel_rows(level: VectorLevel | None = None) -> int:
    """Output features of a panel."""
    return _PANEL[vector_level() if level is None else level]


def panel_bytes(kind: str, out_features: int, in_features: int, level: VectorLevel | None = None) -> int:
    """Bytes that a matrix takes as panels; without the compiled kernels too."""
    level = vector_level() if level is None else level
    rows = -(-out_features // _PANEL[level]) * _PANEL[level]
    if kind in INT4_GROUPS:
        group = INT4_GROUPS[kind]
        return rows * -(-in_features // group) * (group // 2 + 2)
    if kind == "int8":
        quantum = _QUANTUM[level]
        return rows * -(-in_features // quantum) * quantum + _scale_bytes(kind, out_features, level)
    return rows * (in_features + in_features % 2 * (level == VectorLevel.AVX512)) * 2


def _scale_bytes(kind: str, out_features: int, level: VectorLevel) -> int:
    """Of the float32 scales behind int8 panels, whose bytes are a multiple of 4 of them."""
    return -(-out_features // _PANEL[level]) * _PANEL[level] * 4 if kind == "int8" else 0


def _library() -> ctypes.CDLL:
    library = native_library()
    if library is None:
        raise RuntimeError("the compiled kernels are not there: ask `native_library` first")
    return library
