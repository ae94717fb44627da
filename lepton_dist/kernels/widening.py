"""Products with weights that are widened to float32 some rows at a time, where torch has nothing faster on a CPU.

A matrix that is widened whole is written to memory and read again for every product; some rows stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_BLOCK_WEIGHTS = 1 << 19  # 2 MiB in float32


def widened_product(x: torch.Tensor, out_features: int, widen: Callable[[slice, torch.Tensor], object]) -> torch.Tensor:
    """[tokens, in] of any float dtype -> float32 [tokens, out].

    `widen` writes rows of the weight, by output feature, into a float32 [rows, in], which is used again after it.
    """
    tokens, in_features = x.shape
    step = max(16, _BLOCK_WEIGHTS // in_features)
    x, y = x.float(), torch.empty((tokens, out_features))
    room = torch.empty((min(step, out_features), in_features))
    for first in range(0, out_features, step):
        rows = slice(first, min(first + step, out_features))
        block = room[: rows.stop - first]
        widen(rows, block)
        torch.mm(x, block.t(), out=y[:, rows])
    return y
