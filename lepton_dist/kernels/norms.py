"""Norms over the last dim, computed in float32 and given in the dtype that the next matmul takes."""

from __future__ import annotations

import torch
from torch.nn import functional

from lepton_dist.kernels.cpu import pointwise
from lepton_dist.kernels.cuda.library import fused_kernels_for


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """Root mean square norm (arXiv:1910.07467): [..., dim] of any float dtype -> `dtype`; weight float32 [dim]."""
    is_plain = x.dim() == 2 and x.dtype == torch.float32 and x.is_contiguous()
    if is_plain and (library := pointwise.library_for(x)) is not None:
        return pointwise.rms_norm(library, x, None, weight, eps, dtype)
    if is_plain and (fused := fused_kernels_for(x)) is not None:
        normed: torch.Tensor = fused.add_rms_norm(x, None, weight, eps, dtype)
        return normed
    return functional.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """hidden float32 [tokens, dim] += delta, in place; then its `rms_norm`."""
    library = pointwise.library_for(hidden, delta)
    if library is not None and delta.dtype == dtype and delta.is_contiguous():
        return pointwise.rms_norm(library, hidden, delta, weight, eps, dtype)
    if hidden.is_contiguous() and (fused := fused_kernels_for(hidden, delta)) is not None:
        normed: torch.Tensor = fused.add_rms_norm(hidden, delta, weight, eps, dtype)
        return normed
    hidden += delta
    return rms_norm(hidden, weight, eps, dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Layer norm (arXiv:1607.06450): [..., dim] of any float dtype -> `dtype`; weight and bias float32 [dim]."""
    return functional.layer_norm(x.float(), weight.shape, weight, bias, eps).to(dtype)
