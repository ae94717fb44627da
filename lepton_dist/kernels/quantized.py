"""Weights rounded to 8 or 4 bits, the plain way: to nearest, with a scale an output feature or a group of inputs.

The reference, on any device and without compiled kernels: it widens the whole matrix for each product.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lepton_dist.plan.precision import INT4_GROUPS


def round_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [out, in] -> int8 [out, in] and float32 scales [out, 1]; the largest of a row becomes 127."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    # The order of operations is that of the compiled kernels: a tie must not fall to the other side.
    return (weight.float() * _inverse(largest, 127)).round_().to(torch.int8), largest / 127


def round_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float [out, in] -> int8 [out, in / group, group] from -8 to 7, and float16 scales [out, in / group, 1].

    The value of the largest magnitude of a group becomes -8, so that all 16 steps are used (as llama.cpp's Q4_0). The
    last group of a row is filled up with zeros.
    """
    out_features, in_features = weight.shape
    groups = functional.pad(weight.float(), (0, -in_features % group)).view(out_features, -1, group)
    extremes = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = (extremes / -8).to(torch.float16)
    return (groups * _inverse(scales.float(), 1)).round_().clamp_(-8, 7).to(torch.int8), scales


class RoundedWeight:
    """An int8 or int4 matrix in torch's own tensors; int4 takes a byte a weight here."""

    native = None

    def __init__(self, weight: torch.Tensor, kind: str) -> None:
        self.out_features, self.in_features = weight.shape
        rounded = round_int8(weight) if kind == "int8" else round_int4(weight, INT4_GROUPS[kind])
        self._steps, self._scales = rounded

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out, in] that the rounded one stands for."""
        wide = self._steps * self._scales.float()
        return wide.view(self.out_features, -1)[:, : self.in_features].to(dtype)

    def matmul(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `Weight.matmul`."""
        return functional.linear(x, self.dense(x.dtype)).to(dtype or x.dtype)


def _inverse(x: torch.Tensor, of: int) -> torch.Tensor:
    return torch.where(x == 0, 0.0, of / x)
