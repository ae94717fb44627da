"""What the callers of the compiled kernels ask of torch."""

from __future__ import annotations

import torch

from lepton_dist.kernels.cpu import native

KINDS = {getattr(torch, name): number for name, number in native.KINDS.items()}
"""By torch's dtypes: the numbers by which the kernels know them."""


def has_heads_side_by_side(x: torch.Tensor) -> bool:
    """Whether each row of x [tokens, heads, head_dim] is contiguous, whatever lies between rows."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def work_alone() -> None:
    """Let what this thread computes wake no others; without the compiled kernels, nothing changes.

    Not `torch.set_num_threads`, which would speak for all threads of the process.
    """
    torch.get_num_threads()  # torch sets a new thread's number when it is first asked for
    library = native.native_library()
    if library is not None:
        library.lepton_work_alone()
