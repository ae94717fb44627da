"""What this machine can do at best: how fast it reads memory and multiplies. Figures are put beside these."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lepton_dist.kernels.linear import make_weight

_SWEEP_BYTES = 1 << 30
_MATMUL_SIZE = 2048


@dataclass(frozen=True)
class MachineLimits:
    """Of the threads that this process may use."""

    read_bytes_per_s: float
    matmul_flops_per_s: float


def measure_limits(dtype: torch.dtype) -> MachineLimits:
    """The best of a few runs: summing 1 GiB, and a 2048^3 matmul with a packed weight in `dtype`."""
    read_s = _best(torch.ones(_SWEEP_BYTES // 4, dtype=torch.float32).sum)
    weight = make_weight(torch.randn(_MATMUL_SIZE, _MATMUL_SIZE).to(dtype))
    x = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE).to(dtype)
    matmul_s = _best(lambda: weight.matmul(x))
    return MachineLimits(_SWEEP_BYTES / read_s, 2 * _MATMUL_SIZE**3 / matmul_s)


def _best(call: Callable[[], object], repeats: int = 5) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
