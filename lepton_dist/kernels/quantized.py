"""Weights rounded to 8 or 4 bits, the plain way: to nearest, with a scale an output feature or a group of inputs.

On any device and without compiled kernels.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lepton_dist.kernels.gradients import needs_gradient
from lepton_dist.kernels.widening import widened_product
from lepton_dist.plan.precision import INT4_GROUPS

_FEW_ROWS = 16  # of x: up to here torch's product with int8 is faster than widening


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
    """An int8 or int4 matrix in torch's own tensors; int4 takes a byte a weight here.

    On CPUs few rows of bfloat16 are multiplied with int8 by torch's own product; else weights are widened, some at a
    time. On GPUs all of them are, for each product.
    """

    native = None

    def __init__(self, weight: torch.Tensor, kind: str) -> None:
        self.out_features, self.in_features = weight.shape
        rounded = round_int8(weight) if kind == "int8" else round_int4(weight, INT4_GROUPS[kind])
        self._steps, self._scales = rounded[0], rounded[1].float()
        # Torch's own product checks nothing: it reads aligned vectors up to the end of each row.
        has_product = kind == "int8" and weight.is_cpu and self.in_features % 16 == 0
        self._ones = torch.ones(self.out_features, dtype=torch.bfloat16) if has_product else None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out, in] that the rounded one stands for."""
        wide = self._steps * self._scales
        return wide.view(self.out_features, -1)[:, : self.in_features].to(dtype)

    def matmul(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `Weight.matmul`."""
        dtype = dtype or x.dtype
        if not x.is_cpu or needs_gradient(x):
            return functional.linear(x, self.dense(x.dtype)).to(dtype)
        has_width = x.dim() == 2 and x.shape[1] == self.in_features
        if self._ones is not None and x.dtype == torch.bfloat16 and has_width and x.shape[0] <= _FEW_ROWS:
            # It takes scales in bfloat16 only: ours are not rounded, and come after it.
            aligned = (
                x if x.is_contiguous() and x.data_ptr() % 64 == 0 else x.clone(memory_format=torch.contiguous_format)
            )
            steps: torch.Tensor = torch._weight_int8pack_mm(aligned, self._steps, self._ones)
            return (steps.float() * self._scales.t()).to(dtype)
        return widened_product(x, self.out_features, self._widen).to(dtype)

    def _widen(self, rows: slice, wide: torch.Tensor) -> None:
        steps, scales = self._steps[rows], self._scales[rows]
        if steps.numel() == wide.numel():
            torch.mul(steps, scales, out=wide.view(steps.shape))
        else:  # the last group of a row is filled up
            wide.copy_((steps * scales).view(len(wide), -1)[:, : self.in_features])


def _inverse(x: torch.Tensor, of: int) -> torch.Tensor:
    return torch.where(x == 0, 0.0, of / x)
