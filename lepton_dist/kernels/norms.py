"""Norms over the last dim, computed in float32 and given in the dtype that the next matmul takes."""

from __future__ import annotations

import torch
from torch.nn import functional

from lepton_dist.kernels.cpu import pointwise
from lepton_dist.kernels.cuda.library import fused_kernels_for


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """Root mean square norm (arXiv:1910.07467): [..., dim] of any float dtype -> `dtype`; weight float32 [dim]."""
    if (y := pointwise.rms_norm(x, None, weight, eps, dtype)) is not None:
        return y
    if _is_stream(x) and (fused := fused_kernels_for(x, weight)) is not None:
        normed: torch.Tensor = fused.add_rms_norm(x, None, weight, eps, dtype)
        return normed
    return functional.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """hidden float32 [tokens, dim] += delta, in place; then its `rms_norm`."""
    if (y := pointwise.rms_norm(hidden, delta, weight, eps, dtype)) is not None:
        return y
    is_plain = _is_stream(hidden) and delta.shape == hidden.shape
    if is_plain and (fused := fused_kernels_for(hidden, delta, weight)) is not None:
        normed: torch.Tensor = fused.add_rms_norm(hidden, delta, weight, eps, dtype)
        return normed
    hidden += delta
    return rms_norm(hidden, weight, eps, dtype)


def norm_heads(
    x: torch.Tensor, heads: int, query_weight: torch.Tensor, key_weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The `rms_norm` of each head of x [tokens, heads + kv_heads, head_dim]; it may take the place of `x`.

    The first `heads` are multiplied with query_weight float32 [head_dim], the others with key_weight.
    """
    if pointwise.norm_heads(x, heads, query_weight, key_weight, eps):
        return x
    queries = rms_norm(x[:, :heads], query_weight, eps, x.dtype)
    return torch.cat((queries, rms_norm(x[:, heads:], key_weight, eps, x.dtype)), dim=1)


def _is_stream(x: torch.Tensor) -> bool:
    return x.dim() == 2 and x.dtype == torch.float32 and x.is_contiguous()


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Layer norm (arXiv:1607.06450): [..., dim] of any float dtype -> `dtype`; weight and bias float32 [dim]."""
    return functional.layer_norm(x.float(), weight.shape, weight, bias, eps).to(dtype)
