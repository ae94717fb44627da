"""Matmul over packed panels of weights, by the compiled kernels of `matmul_bf16.c`, `matmul_int8.c`, `matmul_int4.c`.

For CPUs without matrix instructions: torch's own bfloat16 and 8-bit products are reference loops there.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from lepton_dist.kernels.cpu.native import VectorLevel, address_of
from lepton_dist.kernels.cpu.panels import Panels
from lepton_dist.kernels.cpu.tensors import KINDS


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
    """A matrix [out, in] as panels that are filled.

    On AVX-512 panels of bfloat16 round `x` to bfloat16, those of int8 and int4 round it to 8 bits, with a scale for
    each 512 values.
    """

    def __init__(self, panels: Panels) -> None:
        self._panels, place = panels, panels.place
        self.out_features, self.in_features = panels.out_features, panels.in_features
        self._function = panels.kernels.matmul
        self._call = MatmulCall(weights=place.bytes, scales=place.scales, in_=place.in_, group=place.group)
        self._call.out = self._call.y_stride = panels.out_features
        self._reference = ctypes.byref(self._call)
        self.native = native_product(self._function, self._call)

    @classmethod
    def of(cls, weight: torch.Tensor, kind: str, level: VectorLevel | None = None) -> PanelWeight:
        """A float matrix [out, in] as panels; float32 or bfloat16, which panels of bfloat16 need."""
        weight, panels = weight.contiguous(), Panels(weight.shape[0], weight.shape[1], kind, level)
        panels.pack(0, weight.shape[0], weight.data_ptr(), KINDS[weight.dtype], torch.get_num_threads())
        return cls(panels)

    @property
    def packed(self) -> torch.Tensor:
        """The bytes of the panels, and of the scales behind those of int8."""
        pages = self._panels.pages
        return torch.frombuffer(pages.buffer, dtype=torch.uint8, count=pages.size, offset=pages.start)

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


def native_product(function: object, call: ctypes.Structure) -> NativeProduct:
    """A kernel and a `struct matmul_call` as C sees them; keep the structure."""
    return NativeProduct(address_of(function), ctypes.addressof(call))
