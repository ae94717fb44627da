"""Norms over the last dim, computed in float32 and given in the dtype that the next matmul takes."""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """Root mean square norm (arXiv:1910.07467): [..., dim] of any float dtype -> `dtype`; weight float32 [dim]."""
    return functional.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Layer norm (arXiv:1607.06450): [..., dim] of any float dtype -> `dtype`; weight and bias float32 [dim]."""
    return functional.layer_norm(x.float(), weight.shape, weight, bias, eps).to(dtype)
