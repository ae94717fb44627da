"""Random caches and batches for tests of attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lepton_dist.kernels.attention import PagedBatch


def random_batch(
    spans: Sequence[tuple[int, int]], kv_heads: int, dim: int, block_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, PagedBatch]:
    """Arenas of random values, and a batch of sequences given as (new tokens, tokens in the cache with them).

    Blocks are dealt out in random order, so that no sequence lies in a row.
    """
    counts, lengths = np.array(spans, dtype=np.int64).T
    blocks = -(-lengths // block_tokens)
    order = torch.randperm(int(blocks.sum())).tolist()
    tables = torch.zeros(len(spans), int(blocks.max()), dtype=torch.int64)
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    starts = np.cumsum(counts) - counts
    arenas = [torch.randn(int(blocks.sum()), kv_heads, block_tokens, dim).to(dtype) for _ in range(2)]
    slots = torch.zeros(int(counts.sum()), dtype=torch.int64)
    return arenas[0], arenas[1], PagedBatch(slots, np.stack([starts, counts, lengths], axis=1), tables)
