"""Weights as panels of output features, as the kernels read them: their sizes, and room for them. Without torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from lepton_dist.kernels.cpu.native import VectorLevel, native_library, vector_level
from lepton_dist.kernels.cpu.pages import Pages
from lepton_dist.kernels.cpu.structures import PanelPlace
from lepton_dist.plan.precision import INT4_GROUPS, QUANTIZED
from lepton_dist.values import FLOAT_BYTES

_PANEL = {VectorLevel.NONE: 16, VectorLevel.AVX2: 16, VectorLevel.AVX512: 32}
"""Output features of a panel, as in matmul.h and matmul_512.h."""
_QUANTUM = {VectorLevel.NONE: 2, VectorLevel.AVX2: 2, VectorLevel.AVX512: 4}
"""Neighbouring bytes of an int8 weight that are multiplied together."""


@dataclass(frozen=True)
class PanelKernels:
    """The compiled functions of a kind of panels."""

    pack: ctypes._NamedFuncPointer
    matmul: ctypes._NamedFuncPointer

    @staticmethod
    def of(kind: str, level: VectorLevel) -> PanelKernels:
        """Those for the instructions of `level`. The compiled kernels are there: ask `native_library` first."""
        library = native_library()
        if library is None:
            raise RuntimeError("the compiled kernels are not there: ask `native_library` first")
        name = {"bfloat16": "bf16", "int8": "int8"}.get(kind, "int4") + ("_512" if level == VectorLevel.AVX512 else "")
        return PanelKernels(getattr(library, f"lepton_pack_{name}"), getattr(library, f"lepton_matmul_{name}"))


class Panels:
    """Room for a matrix [out, in]: bfloat16, int8 (a scale an output feature) or int4 (a scale a group of a row).

    Made empty; rows are packed into `place`. `level` is that of the kernels, by default the highest of this machine.
    """

    def __init__(self, out_features: int, in_features: int, kind: str, level: VectorLevel | None = None) -> None:
        if out_features < 1 or in_features < 1:
            raise ValueError(f"panels of a matrix [{out_features}, {in_features}]: it has no elements")
        self.out_features, self.in_features, self.kind = out_features, in_features, kind
        level = vector_level() if level is None else level
        self.rows = panel_rows(level)
        self.kernels = PanelKernels.of(kind, level)
        size = panel_bytes(kind, out_features, in_features, level)
        self.pages = Pages(size)
        scales = self.pages.address + size - _scale_bytes(kind, out_features, level)
        self.place = PanelPlace(self.pages.address, scales, in_features, INT4_GROUPS.get(kind, 0))

    def pack(self, first: int, count: int, rows: int, kind: int, threads: int = 1) -> None:
        """Take rows [count, in] at the address `rows`, contiguous, of one of `KINDS`, from output feature `first` on.

        `first` is a multiple of a panel's `rows`, and so is their number unless they are the last.

        Raises:
            ValueError: they are not, or not all within the matrix.
        """
        last = first + count
        if (
            first % self.rows
            or not 0 <= first <= last <= self.out_features
            or (count % self.rows and last < self.out_features)
        ):
            raise ValueError(
                f"rows {first} to {last} of {self.out_features} are no whole panels of {self.rows} output features"
            )
        self.kernels.pack(ctypes.addressof(self.place), rows, kind, first, count, threads)


def panel_kind(dtype: str, kind: str | None = None) -> str | None:
    """The kind of panels that a float matrix on a CPU is held as where `kind` is asked for; None for another form."""
    library = native_library()
    if library is None:
        return None
    if kind is not None and kind in QUANTIZED:
        return kind
    return "bfloat16" if dtype == "bfloat16" and not library.lepton_leaves_bf16() else None


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


def matrix_bytes(kind: str, out_features: int, in_features: int) -> int:
    """Bytes of a matrix [out, in] of a kind: one of `QUANTIZED`, or the name of a float dtype."""
    if kind in QUANTIZED:
        return panel_bytes(kind, out_features, in_features)
    return out_features * in_features * FLOAT_BYTES[kind]


def _scale_bytes(kind: str, out_features: int, level: VectorLevel) -> int:
    """Of the float32 scales behind int8 panels, whose bytes are a multiple of 4 of them."""
    return -(-out_features // _PANEL[level]) * _PANEL[level] * 4 if kind == "int8" else 0
