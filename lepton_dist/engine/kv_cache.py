"""This rank's KV cache: the arenas of its layers, and attention through them for one batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.engine.batch import RunBatch, read_int32, read_spans
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.kernels.attention import PagedBatch, ReadRows, enter_cache, paged_attention
from lepton_dist.kernels.cpu.memory import fresh_zeros
from lepton_dist.kernels.upload import upload


class KvCache:
    """Keys and values of this rank's layers: each [blocks, kv_heads/tp, block_tokens, head_dim].

    On CPUs pages of the arenas are touched, and so take memory, only when they are first written. On a GPU there is a
    block more than the scheduler knows of, `spare_slot` in it: where rows of a captured batch that are padding write.
    """

    def __init__(self, geometry: KvGeometry, num_blocks: int, device: torch.device | None = None) -> None:
        is_gpu = device is not None and device.type == "cuda"
        shape = (num_blocks + is_gpu, geometry.num_kv_heads, geometry.block_tokens, geometry.head_dim)
        self.geometry, self.num_blocks = geometry, num_blocks
        self.spare_slot = num_blocks * geometry.block_tokens

        def arenas() -> list[torch.Tensor]:
            # Zeros take no memory before they are written to.
            if device is None or device.type == "cpu":
                return [fresh_zeros(shape, geometry.dtype) for _ in range(geometry.num_layers)]
            return [torch.zeros(shape, dtype=geometry.dtype, device=device) for _ in range(geometry.num_layers)]

        self._keys, self._values = arenas(), arenas()

    def arenas(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values of a layer."""
        return self._keys[layer], self._values[layer]


@dataclass(frozen=True)
class CachedAttention:
    """Attention of one batch through the cache: `model.layers.Attend`."""

    cache: KvCache
    batch: PagedBatch

    def __call__(
        self,
        layer: int,
        turned: torch.Tensor,
        value: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        window: int | None,
        read: ReadRows | None = None,
    ) -> torch.Tensor:
        """Rotate, write the batch's keys and values, then attend."""
        keys, values = self.arenas(layer)
        query = enter_cache(turned, value, angles, keys, values, self.batch.slots)
        if read is None:
            return paged_attention(query, keys, values, self.batch, window)
        if not read.index.numel():
            return query[:0]
        return paged_attention(query[read.index], keys, values, read.queries, window)

    def arenas(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Attend`."""
        return self.cache.arenas(layer)

    def of_rows(self, rows: NDArray[np.int64]) -> CachedAttention:
        """See `Attend`."""
        return CachedAttention(self.cache, self.batch.of_rows(rows))


@dataclass(frozen=True)
class Layout:
    """Where a batch's tokens lie: positions and slots int64 [tokens]; spans and tables as in `PagedBatch`."""

    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    spans: NDArray[np.int64]
    tables: NDArray[np.int64]

    def paged(self, device: torch.device) -> PagedBatch:
        """The batch as attention on `device` takes it."""
        return PagedBatch(upload(self.slots, device), self.spans, upload(self.tables, device))


def lay_out(batch: RunBatch, block_tokens: int) -> Layout:
    """Find the place of every token of a batch."""
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
    return Layout(positions, slots, spans, tables)
