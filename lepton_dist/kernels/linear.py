"""Weights ready to be multiplied with: the seam behind which packed and quantised kinds live."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from lepton_dist.kernels.cpu.matmul import NativeProduct, PanelWeight
from lepton_dist.kernels.cpu.panels import panel_kind
from lepton_dist.kernels.gradients import needs_gradient, refuse_gradient
from lepton_dist.kernels.quantized import RoundedWeight
from lepton_dist.kernels.widening import widened_product
from lepton_dist.plan.precision import QUANTIZED

_FEW_ROWS = 6  # of x


class Weight(Protocol):
    """A matrix [out, in] held in whatever form its kernel likes best.

    `native` is its kernel, where that is one of ours.
    """

    out_features: int
    in_features: int

    @property
    def native(self) -> NativeProduct | None:
        """See above."""
        ...

    def matmul(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[tokens, in] -> [tokens, out] in `dtype`, by default that of `x`."""
        ...


class DenseWeight:
    """A plain torch matrix [out, in].

    Where torch's bfloat16 product is a reference loop, on CPUs below AVX-512, more than a few rows of `x` are
    multiplied in float32 with weights that are widened, some at a time.
    """

    native = None

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self.out_features, self.in_features = weight.shape
        is_bfloat16 = weight.dtype == torch.bfloat16 and weight.is_cpu
        self._is_slow = is_bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @property
    def matrix(self) -> torch.Tensor:
        """[out, in], for kernels that do more than the product."""
        return self._weight

    def matmul(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `Weight.matmul`."""
        dtype = dtype or x.dtype
        if self._is_slow and x.shape[0] > _FEW_ROWS and not needs_gradient(x, self._weight):
            return widened_product(x, self.out_features, lambda rows, wide: wide.copy_(self._weight[rows])).to(dtype)
        return functional.linear(x, self._weight).to(dtype)


class PackedWeight:
    """A bfloat16 matrix in oneDNN's blocked layout, which streams from memory about three times as fast as a plain one.

    The layout is the same for every number of tokens, so one copy serves decode and prefill.
    """

    native = None

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def matmul(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `Weight.matmul`; `x` is bfloat16.

        Raises:
            GradientError: autograd follows `x`.
        """
        refuse_gradient(x, "a product with packed weights", "keep the weights as plain matrices to train (DenseWeight)")
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product.to(dtype or x.dtype)


def make_weight(weight: torch.Tensor, kind: str | None = None) -> Weight:
    """The fastest form that this device has for a float matrix [out, in].

    `kind` names its dtype (by default its own), or one of `QUANTIZED`, to which it is rounded.
    """
    panels = panel_kind(str(weight.dtype).removeprefix("torch."), kind) if weight.is_cpu else None
    if panels is not None:
        return PanelWeight.of(weight, panels)
    if kind is not None and kind in QUANTIZED:
        return RoundedWeight(weight, kind)
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return PackedWeight(weight)
    return DenseWeight(weight)
