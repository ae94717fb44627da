"""This rank's KV cache: the arenas of its layers, and attention through them for one batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lepton_dist.engine.batch import RunBatch, read_int32, read_spans
from lepton_dist.kernels.attention import PagedBatch, paged_attention, write_cache


@dataclass(frozen=True)
class KvGeometry:
    """The shape of a rank's cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all the rank's layers, keys and values."""
        return 2 * self.num_layers * self.block_tokens * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KvCache:
    """Keys and values of this rank's layers: each [blocks, kv_heads/tp, block_tokens, head_dim].

    Pages of the arenas are touched, and so take memory, only when they are first written.
    """

    def __init__(self, geometry: KvGeometry, num_blocks: int) -> None:
        shape = (num_blocks, geometry.num_kv_heads, geometry.block_tokens, geometry.head_dim)
        self.geometry = geometry
        # Zeros, not garbage: padded block tables read block 0, and masked-out NaNs would still poison a sum.
        self._keys = [torch.zeros(shape, dtype=geometry.dtype) for _ in range(geometry.num_layers)]
        self._values = [torch.zeros(shape, dtype=geometry.dtype) for _ in range(geometry.num_layers)]

    def attend(
        self,
        batch: PagedBatch,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:
        """Write the batch's keys and values, then attend: the shapes of `model.layers.Attend`."""
        write_cache(self._keys[layer], self._values[layer], batch.slots, key, value)
        return paged_attention(query, self._keys[layer], self._values[layer], batch, window)


def lay_out(batch: RunBatch, block_tokens: int) -> tuple[torch.Tensor, PagedBatch]:
    """Positions int64 [tokens] of a batch, and where its tokens lie in the cache."""
    fields = read_spans(batch)
    spans = fields[:, :3].astype(np.int64)
    starts, counts, lengths = spans.T
    num_blocks = fields[:, 3]
    # Each sequence's blocks in a row of their own.
    tables = np.zeros((len(spans), num_blocks.max()), dtype=np.int64)
    tables[np.arange(tables.shape[1]) < num_blocks[:, np.newaxis]] = read_int32(batch.block_tables)
    of = np.repeat(np.arange(len(spans)), counts)
    positions = np.arange(batch.num_tokens) + (lengths - counts - starts)[of]
    slots = tables[of, positions // block_tokens] * block_tokens + positions % block_tokens
    return torch.from_numpy(positions), PagedBatch(torch.from_numpy(slots), spans, torch.from_numpy(tables))
