"""This rank's KV cache: the arenas of its layers, and attention through them for one batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lepton_dist.engine.batch import RunBatch, read_int32, read_spans
from lepton_dist.kernels.attention import Decodes, PagedBatch, Prefill, paged_attention, write_cache


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
    """Keys and values of this rank's layers: each [blocks, block_tokens, kv_heads/tp, head_dim].

    Pages of the arenas are touched, and so take memory, only when they are first written.
    """

    def __init__(self, geometry: KvGeometry, num_blocks: int) -> None:
        shape = (num_blocks, geometry.block_tokens, geometry.num_kv_heads, geometry.head_dim)
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
        write_cache(self._keys[layer], batch.slots, key)
        write_cache(self._values[layer], batch.slots, value)
        return paged_attention(query, self._keys[layer], self._values[layer], batch, window)


def lay_out(batch: RunBatch, block_tokens: int) -> tuple[torch.Tensor, PagedBatch]:
    """Positions int64 [tokens] of a batch, and where its tokens lie in the cache."""
    spans = read_spans(batch)
    tables = np.split(read_int32(batch.block_tables), np.cumsum(spans[:, 3])[:-1])
    positions = np.empty(batch.num_tokens, dtype=np.int64)
    slots = np.empty(batch.num_tokens, dtype=np.int64)
    decodes: list[int] = []
    prefills: list[Prefill] = []
    for index, (start, count, length, _, _) in enumerate(spans.tolist()):
        at = np.arange(length - count, length)
        positions[start : start + count] = at
        slots[start : start + count] = (
            tables[index][at // block_tokens].astype(np.int64) * block_tokens + at % block_tokens
        )
        if count == 1:
            decodes.append(index)
        else:
            prefills.append(Prefill(start, count, length, torch.from_numpy(tables[index].astype(np.int64))))
    paged = PagedBatch(torch.from_numpy(slots), _decodes(spans, tables, decodes), prefills)
    return torch.from_numpy(positions), paged


def _decodes(spans: np.ndarray, tables: list[np.ndarray], chosen: list[int]) -> Decodes | None:
    if not chosen:
        return None
    width = max(len(tables[index]) for index in chosen)
    padded = np.zeros((len(chosen), width), dtype=np.int64)
    for row, index in enumerate(chosen):
        padded[row, : len(tables[index])] = tables[index]
    rows, lengths = spans[chosen, 0].astype(np.int64), spans[chosen, 2].astype(np.int64)
    return Decodes(torch.from_numpy(rows), torch.from_numpy(padded), torch.from_numpy(lengths))
