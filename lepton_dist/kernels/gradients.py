"""Whether autograd is to follow: our own kernels have no backward, and must not lose a gradient without a word."""

from __future__ import annotations

import torch

from lepton_dist.errors import GradientError


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether what is computed from these must be differentiable."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_gradient(x: torch.Tensor, what: str, instead: str) -> None:
    """Raise where `x` needs one and `what` has none to give; `instead` says what to do.

    Raises:
        GradientError: it needs one.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise GradientError(f"{what} has no backward, and its input requires a gradient: {instead}")
