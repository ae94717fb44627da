"""Rotary positions on queries and keys (arXiv:2104.09864), halves rotated against each other."""

from __future__ import annotations

import torch

from lepton_dist.kernels.cpu import pointwise


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first 2 * cos.shape[-1] channels of each head. The result may take the place of `x`.

    x [tokens, heads, head_dim] of any float dtype; cos, sin float32 [tokens, 1, dim / 2]. Computed in float32.
    """
    half = cos.shape[-1]
    if pointwise.rotate(x, cos, sin):
        return x
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.empty_like(x)
    rotated[..., :half] = first * cos - second * sin
    rotated[..., half : 2 * half] = second * cos + first * sin
    if x.shape[-1] > 2 * half:
        rotated[..., 2 * half :] = x[..., 2 * half :]
    return rotated
