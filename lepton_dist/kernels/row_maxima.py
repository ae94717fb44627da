"""The largest score of each row, and where it is."""

from __future__ import annotations

import torch

from lepton_dist.kernels.cpu import pointwise


def row_maxima(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, n] -> the largest [rows] and its index int64 [rows], on the CPU the lowest at a tie.

    The largest is NaN where a score is.
    """
    if (found := pointwise.arg_max(scores)) is not None:
        return found
    values, indices = scores.max(dim=1)
    return values, indices
