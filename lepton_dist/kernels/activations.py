"""The nonlinearities of the MLP, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


def gated(x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """act(gate) * up: x [tokens, 2 * ffn] holds gate, then up -> [tokens, ffn]."""
    gate, up = x.chunk(2, dim=-1)
    return activation(gate).mul_(up)
