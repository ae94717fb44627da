"""Finding the Triton kernels: where a GPU, Triton and what Triton needs to compile are there."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from lepton_dist.kernels.gradients import needs_gradient


def fused_kernels_for(*tensors: torch.Tensor) -> ModuleType | None:
    """`kernels.cuda.fused`, if it works here, all tensors lie on a GPU, and none asks for a gradient; else None."""
    for tensor in tensors:
        if not tensor.is_cuda:
            return None
    return None if needs_gradient(*tensors) else _tried()[0]


def triton_problem() -> str:
    """Why the Triton kernels cannot be used on this process's GPU, in words; empty when they can."""
    return _tried()[1]


@cache
def _tried() -> tuple[ModuleType | None, str]:
    """The kernels and an empty string, or None and what went wrong: the smallest of them is compiled and run."""
    if not torch.cuda.is_available():
        return None, "there is no GPU"
    try:
        fused = import_module("lepton_dist.kernels.cuda.fused")
        x = torch.ones(1, 4, device="cuda")
        fused.gated_silu(x)
        torch.cuda.synchronize()
    except Exception as error:  # no Triton, no C compiler for its launchers, a driver it does not know: many kinds
        lines = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    return fused, ""
