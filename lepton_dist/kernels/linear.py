"""Weights ready to be multiplied with: the seam behind which packed and quantised kinds live."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional


class Weight(Protocol):
    """A matrix [out, in] held in whatever form its kernel likes best."""

    out_features: int
    in_features: int

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] -> [tokens, out] in the dtype of `x`."""
        ...


class DenseWeight:
    """A plain torch matrix [out, in]."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self.out_features, self.in_features = weight.shape

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """As `Weight.matmul`."""
        return functional.linear(x, self._weight)


class PackedWeight:
    """A bfloat16 matrix in oneDNN's blocked layout, which streams from memory about three times as fast as a plain one.

    The layout is the same for every number of tokens, so one copy serves decode and prefill.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """As `Weight.matmul`; `x` is bfloat16."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product


def make_weight(weight: torch.Tensor) -> Weight:
    """The fastest form that this device has for a float matrix [out, in]."""
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return PackedWeight(weight)
    return DenseWeight(weight)
