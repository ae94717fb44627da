"""What the callers of the compiled kernels ask of torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lepton_dist.kernels.cpu import native

KINDS = {getattr(torch, name): number for name, number in native.KINDS.items()}
"""By torch's dtypes: the numbers by which the kernels know them."""


def has_heads_side_by_side(x: torch.Tensor) -> bool:
    """Whether each row of x [tokens, heads, head_dim] is contiguous, whatever lies between rows."""
    return are_side_by_side(x.shape, x.stride())


def are_side_by_side(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """The same of a shape and its strides."""
    return strides[2] == 1 and strides[1] == shape[2]


def is_dense(x: torch.Tensor, dtype: torch.dtype, count: int) -> bool:
    """Whether x is `count` numbers of the dtype in memory of the CPU, one behind the other."""
    return x.dtype == dtype and x.is_contiguous() and x.numel() == count and x.is_cpu


def work_alone() -> None:
    """Let what this thread computes wake no others; without the compiled kernels, nothing changes.

    Not `torch.set_num_threads`, which would speak for all threads of the process.
    """
    torch.get_num_threads()  # torch sets a new thread's number when it is first asked for
    library = native.native_library()
    if library is not None:
        library.lepton_work_alone()
