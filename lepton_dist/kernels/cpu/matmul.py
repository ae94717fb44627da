"""Matmul over packed panels of weights, by the compiled kernels of `matmul_bf16.c`, `matmul_int8.c`, `matmul_int4.c`.

For CPUs without matrix instructions: torch's own bfloat16 and 8-bit products are reference loops there.
"""

from __future__ import annotations

import ctypes

import torch

from lepton_dist.kernels.cpu.memory import fresh_zeros
from lepton_dist.kernels.cpu.native import KINDS, native_library
from lepton_dist.plan.precision import INT4_GROUPS

_PANEL = 16  # as in matmul.h


class _MatmulCall(ctypes.Structure):
    """`struct matmul_call` of matmul.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "weights", "scales")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "in_", "out", "x_stride", "y_stride", "x_kind", "y_kind", "threads", "group")
        ),
    )


class PanelWeight:
    """A matrix [out, in] as panels: bfloat16, int8 (a scale an output feature) or int4 (a scale a group of a row)."""

    def __init__(self, weight: torch.Tensor, kind: str) -> None:
        self.out_features, self.in_features = weight.shape
        library, weight, group = _library(), weight.contiguous(), INT4_GROUPS.get(kind, 0)
        if kind == "bfloat16":
            self._panels, self._scales = _pack_bf16(weight), None
            self._function = library.lepton_matmul_bf16
        elif kind == "int8":
            self._panels, self._scales = _pack_int8(weight)
            self._function = library.lepton_matmul_int8
        else:
            self._panels, self._scales = _pack_int4(weight, kind), None
            self._function = library.lepton_matmul_int4
        scales = None if self._scales is None else self._scales.data_ptr()
        self._call = _MatmulCall(weights=self._panels.data_ptr(), scales=scales, in_=self.in_features, group=group)
        self._call.out = self._call.y_stride = self.out_features
        self._reference = ctypes.byref(self._call)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] float32 or bfloat16, channels side by side -> [tokens, out] in the dtype of `x`."""
        rows = x.shape[0]
        y = x.new_empty((rows, self.out_features))
        call = self._call
        call.x, call.y, call.rows, call.x_stride = x.data_ptr(), y.data_ptr(), rows, x.stride(0)
        call.x_kind = call.y_kind = KINDS[x.dtype]
        call.threads = torch.get_num_threads()
        if self._function(self._reference):
            raise MemoryError(f"no memory for the activations of {rows} tokens x {self.in_features} channels")
        return y


def panel_bytes(kind: str, out_features: int, in_features: int) -> int:
    """Bytes that a matrix takes as panels; without the compiled kernels too."""
    rows = -(-out_features // _PANEL) * _PANEL
    if kind == "bfloat16":
        return rows * in_features * 2
    if kind == "int8":
        return rows * (in_features + in_features % 2 + 4)
    group = INT4_GROUPS[kind]
    return rows * -(-in_features // group) * (group // 2 + 2)


def _pack_bf16(weight: torch.Tensor) -> torch.Tensor:
    panels = fresh_zeros((panel_bytes("bfloat16", *weight.shape),), torch.uint8)
    _library().lepton_pack_bf16(weight.data_ptr(), *weight.shape, panels.data_ptr(), torch.get_num_threads())
    return panels


def _pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = torch.empty(-(-weight.shape[0] // _PANEL) * _PANEL)
    panels = fresh_zeros((panel_bytes("int8", *weight.shape) - scales.nbytes,), torch.int8)
    matrix, places = (weight.data_ptr(), KINDS[weight.dtype], *weight.shape), (panels.data_ptr(), scales.data_ptr())
    _library().lepton_pack_int8(*matrix, *places, torch.get_num_threads())
    return panels, scales


def _pack_int4(weight: torch.Tensor, kind: str) -> torch.Tensor:
    panels = fresh_zeros((panel_bytes(kind, *weight.shape),), torch.uint8)
    matrix = (weight.data_ptr(), KINDS[weight.dtype], *weight.shape, INT4_GROUPS[kind])
    _library().lepton_pack_int4(*matrix, panels.data_ptr(), torch.get_num_threads())
    return panels


def _library() -> ctypes.CDLL:
    library = native_library()
    if library is None:
        raise RuntimeError("the compiled kernels are not there: ask `native_library` first")
    return library
