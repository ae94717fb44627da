"""Matmul over packed panels of weights, by the compiled kernels of `matmul_bf16.c`, `matmul_int8.c`, `matmul_int4.c`.

For CPUs without matrix instructions: torch's own bfloat16 and 8-bit products are reference loops there.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from lepton_dist.kernels.cpu.native import VectorLevel, address_of, native_library
from lepton_dist.kernels.cpu.panels import Panels
from lepton_dist.kernels.cpu.structures import MatmulCall, pack_multiply
from lepton_dist.kernels.cpu.tensors import KINDS
from lepton_dist.kernels.gradients import refuse_gradient


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
        library = native_library()
        assert library is not None  # which made the panels
        self._multiply = library.lepton_multiply
        self._call = MatmulCall(weights=place.bytes, scales=place.scales, in_=place.in_, group=place.group)
        self._call.out = panels.out_features
        self.native = native_product(panels.kernels.matmul, self._call)
        self._address, self._of_weight = self.native.function, self.native.call

    @classmethod
    def of(cls, weight: torch.Tensor, kind: str, level: VectorLevel | None = None) -> PanelWeight:
        """A float matrix [out, in] on the CPU as panels; float32 or bfloat16, which panels of bfloat16 need.

        Raises:
            ValueError: it is another tensor.
        """
        takes = (torch.bfloat16,) if kind == "bfloat16" else tuple(KINDS)
        if weight.dim() != 2 or not weight.is_cpu or weight.dtype not in takes:
            raise ValueError(
                f"panels of {kind} are made of a matrix of {' or '.join(map(str, takes))} on the CPU, not of "
                f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
            )
        weight, panels = weight.detach().contiguous(), Panels(weight.shape[0], weight.shape[1], kind, level)
        panels.pack(0, weight.shape[0], weight.data_ptr(), KINDS[weight.dtype], torch.get_num_threads())
        return cls(panels)

    @property
    def packed(self) -> torch.Tensor:
        """The bytes of the panels, and of the scales behind those of int8."""
        pages = self._panels.pages
        return torch.frombuffer(pages.buffer, dtype=torch.uint8, count=pages.size, offset=pages.start)

    def matmul(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[tokens, in] float32 or bfloat16 -> [tokens, out] in `dtype`, or that of `x`. Threads may share a weight.

        Raises:
            ValueError: `x` has another width, dtype or device, or `dtype` is another than those two.
            GradientError: autograd follows `x`.
        """
        # Each question to torch is asked once, for all of them together take less than a microsecond.
        shape, strides, dtype = x.shape, x.stride(), dtype or x.dtype
        x_kind, y_kind = KINDS.get(x.dtype), KINDS.get(dtype)
        if len(shape) != 2 or shape[1] != self.in_features or x_kind is None or y_kind is None or not x.is_cpu:
            raise ValueError(
                f"this weight [{self.out_features}, {self.in_features}] takes float32 or bfloat16 [tokens, "
                f"{self.in_features}] on the CPU and gives one of the two; it was given {x.dtype} {tuple(shape)} on "
                f"{x.device}, to give {dtype}"
            )
        if x.requires_grad:
            refuse_gradient(x, "a product with packed weights", "keep them as plain matrices to train (DenseWeight)")
        if strides[1] != 1:
            x = x.contiguous()
            strides = x.stride()
        rows = shape[0]
        y = torch.empty((rows, self.out_features), dtype=dtype)
        tensors = x.data_ptr(), y.data_ptr(), rows, strides[0], x_kind, y_kind
        if self._multiply(pack_multiply(self._address, self._of_weight, *tensors, torch.get_num_threads())):
            raise MemoryError(f"no memory for the activations of {rows} tokens x {self.in_features} channels")
        return y


def native_product(function: object, call: ctypes.Structure) -> NativeProduct:
    """A kernel and a `struct matmul_call` as C sees them; keep the structure."""
    return NativeProduct(address_of(function), ctypes.addressof(call))
