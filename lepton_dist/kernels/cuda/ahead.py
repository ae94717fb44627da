"""Kernels that start before the one in front of them has ended: programmatic dependent launch, from Hopper on.

Such a kernel first says that the next may start, and then waits until all before it is over and written. Until then it
touches nothing but weights, so the order of a stream holds: each waits for the one before, which has waited itself.
What is saved is the way from one launch to the next, also within a captured graph.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton

_MAJORS = (9, 10)  # of the compute capabilities of data centre GPUs that have it


@cache
def starts_ahead() -> bool:
    """Whether kernels do so on this process's GPU: their constant AHEAD."""
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability()[0] in _MAJORS


def launch_options() -> dict[str, Any]:
    """What a launch of a kernel with that constant is given beside it."""
    return {"launch_pdl": True} if starts_ahead() else {}
