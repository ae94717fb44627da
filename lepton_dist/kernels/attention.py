"""Attention over a paged KV cache: the torch path, on any device, and the faster kernels where they are.

The cache of a layer is two arenas [blocks, block_tokens, kv_heads, head_dim]; a sequence owns the blocks of its block
table in order (PagedAttention, arXiv:2309.06180). New keys and values are written first, then every token attends to
its own sequence up to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from lepton_dist.kernels.cpu import paged


@dataclass
class Decodes:
    """The sequences of a batch that have one new token each.

    rows int64 [n]: their rows in the batch; block_tables int64 [n, blocks], padded with 0; lengths int64 [n]: tokens
    in the cache including the new one.
    """

    rows: torch.Tensor
    block_tables: torch.Tensor
    lengths: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    firsts: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def first(self, window: int | None) -> torch.Tensor:
        """int64 [n]: the first position that each sequence may see."""
        if window not in self.firsts:
            zeros = torch.zeros_like(self.lengths)
            self.firsts[window] = zeros if window is None else torch.maximum(self.lengths - window, zeros)
        return self.firsts[window]

    def mask(self, window: int | None, num_slots: int) -> torch.Tensor:
        """bool [n, 1, 1, slots]: which slots each sequence may see."""
        if window not in self.masks:
            slot = torch.arange(num_slots, device=self.lengths.device)
            ends = self.lengths.unsqueeze(1)
            seen = slot < ends
            if window is not None:
                seen &= slot >= ends - window
            self.masks[window] = seen[:, None, None, :]
        return self.masks[window]


@dataclass
class Prefill:
    """A sequence with several new tokens: rows [start, start + count) of the batch.

    With them it has `length` tokens in the cache, in the blocks of `block_table` int64 [blocks].
    """

    start: int
    count: int
    length: int
    block_table: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """bool [count, length]: causal, and within the window."""
        if window not in self.masks:
            device = self.block_table.device
            query = torch.arange(self.length - self.count, self.length, device=device).unsqueeze(1)
            key = torch.arange(self.length, device=device)
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            self.masks[window] = seen
        return self.masks[window]


@dataclass
class PagedBatch:
    """Where a batch's tokens lie in the cache: slots int64 [tokens] to write to, and the sequences to attend for."""

    slots: torch.Tensor
    decodes: Decodes | None
    prefills: Sequence[Prefill]


def write_cache(arena: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """Put values [tokens, kv_heads, head_dim] into the arena's slots [tokens], converting to the arena's dtype."""
    arena.view(-1, *arena.shape[2:]).index_copy_(0, slots, values.to(arena.dtype))


def paged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int | None
) -> torch.Tensor:
    """query [tokens, heads, head_dim], arenas [blocks, block_tokens, kv_heads, head_dim] -> [tokens, heads, head_dim].

    Softmax and sums in float32 inside torch's scaled_dot_product_attention; scale 1 / sqrt(head_dim).
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if batch.decodes is not None:
        decodes = batch.decodes
        if paged.can_attend(query, keys):
            tables, last = decodes.block_tables, decodes.lengths
            paged.attend(query, keys, values, output, decodes.rows, decodes.first(window), last, tables)
        else:
            output[decodes.rows] = _decode(query, keys, values, decodes, window)
    for prefill in batch.prefills:
        rows = slice(prefill.start, prefill.start + prefill.count)
        output[rows] = _prefill(query[rows], keys, values, prefill, window)
    return output


def _decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Decodes, window: int | None
) -> torch.Tensor:
    count, (_, heads, dim) = batch.rows.numel(), query.shape
    kv_heads = keys.shape[2]
    # The query heads of a KV head take the place of query positions: [n, kv_heads, group, head_dim].
    q = query[batch.rows].view(count, kv_heads, heads // kv_heads, dim)
    k = keys[batch.block_tables].view(count, -1, kv_heads, dim).transpose(1, 2).to(q.dtype)
    v = values[batch.block_tables].view(count, -1, kv_heads, dim).transpose(1, 2).to(q.dtype)
    mask = batch.mask(window, k.shape[2])
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(count, heads, dim)


def _prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Prefill, window: int | None
) -> torch.Tensor:
    heads, dim = query.shape[1:]
    kv_heads = keys.shape[2]
    # [1, heads, tokens, head_dim]
    q = query.transpose(0, 1).unsqueeze(0)
    k = keys[batch.block_table].view(-1, kv_heads, dim)[: batch.length].transpose(0, 1).unsqueeze(0).to(q.dtype)
    v = values[batch.block_table].view(-1, kv_heads, dim)[: batch.length].transpose(0, 1).unsqueeze(0).to(q.dtype)
    is_grouped = heads != kv_heads
    if batch.count == batch.length and (window is None or window >= batch.length):
        output = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
    else:
        output = functional.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask(window), enable_gqa=is_grouped)
    return output[0].transpose(0, 1)
