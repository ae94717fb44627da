"""The nonlinearities of the MLP, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn import functional

from lepton_dist.kernels.cpu import pointwise
from lepton_dist.kernels.cuda.library import fused_kernels_for
from lepton_dist.kernels.gradients import needs_gradient

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def gated(x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """act(gate) * up: x [tokens, 2 * ffn] holds gate, then up -> [tokens, ffn]."""
    if activation is functional.silu and x.is_contiguous():
        if (y := pointwise.gated_silu(x)) is not None:
            return y
        if x.dim() == 2 and (fused := fused_kernels_for(x)) is not None:
            product: torch.Tensor = fused.gated_silu(x)
            return product
    gate, up = x.chunk(2, dim=-1)
    # Some activations keep their result for the backward.
    return activation(gate) * up if needs_gradient(x) else activation(gate).mul_(up)
