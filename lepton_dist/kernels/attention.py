"""Attention over a paged KV cache: the torch path, on any device, and the faster kernels where they are.

The cache of a layer is two arenas [blocks, kv_heads, block_tokens, head_dim]; a sequence owns the blocks of its block
table in order (PagedAttention, arXiv:2309.06180). New keys and values are written first, then every token attends to
its own sequence up to itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lepton_dist.kernels.cpu import paged, pointwise
from lepton_dist.kernels.cpu.paged import PagedTasks
from lepton_dist.kernels.cuda.library import fused_kernels_for
from lepton_dist.kernels.rope import rotate
from lepton_dist.kernels.upload import upload


@dataclass
class Decodes:
    """The sequences of a batch that have one new token each.

    rows int64 [n]: their rows in the batch, None where it has no others; block_tables int64 [n, blocks], padded with 0;
    lengths int64 [n]: tokens in the cache including the new one.
    """

    rows: torch.Tensor | None
    block_tables: torch.Tensor
    lengths: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

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


@dataclass(frozen=True)
class ReadRows:
    """The rows of a batch that are read behind its last layer: int64 [r] where the cache is; their queries."""

    index: torch.Tensor
    queries: PagedBatch


class PagedBatch:
    """Where a batch's tokens lie in the cache, and what they attend to.

    slots int64 [tokens]: where each token's key and value go; spans int64 [sequences, 3]: first row of the batch, rows,
    tokens in the cache including the new ones; tables int64 [sequences, blocks], padded with 0. Slots and tables are
    where the cache is, spans always on the CPU.
    """

    def __init__(self, slots: torch.Tensor, spans: NDArray[np.int64], tables: torch.Tensor) -> None:
        self.slots, self.spans, self.tables = slots, spans, tables
        self._tasks: dict[int, PagedTasks] = {}

    @staticmethod
    def of_decodes(slots: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> PagedBatch:
        """A batch of one new token a sequence whose lengths [n], too, are where the cache is; 0 marks padding.

        Nothing of it is looked at before a kernel does, so it may be used over and over in a captured graph.
        """
        batch = PagedBatch(slots, np.empty((0, 3), dtype=np.int64), tables)
        batch.decodes = Decodes(None, tables, lengths)
        return batch

    def of_rows(self, rows: NDArray[np.int64]) -> PagedBatch:
        """The queries of these rows alone, ascending int64 [r], as a batch of r rows; their keys are in the cache."""
        starts, counts, lengths = self.spans.T
        of = np.searchsorted(starts, rows, side="right") - 1
        ends = (lengths - counts - starts)[of] + rows + 1  # what each row sees
        # A run of neighbouring rows of one sequence is a span.
        first = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(of, prepend=-1) != 0))
        sizes = np.diff(first, append=len(rows))
        spans = np.stack([first, sizes, ends[first + sizes - 1]], axis=1)
        device = self.slots.device
        return PagedBatch(self.slots[upload(rows, device)], spans, self.tables[upload(of[first], device)])

    def tasks(self, group: int) -> PagedTasks:
        """The batch as the compiled kernel takes it, for `group` query heads a KV head."""
        if group not in self._tasks:
            self._tasks[group] = PagedTasks(self.spans, self.tables, group)
        return self._tasks[group]

    @cached_property
    def decodes(self) -> Decodes | None:
        """The sequences with one new token, for the torch path."""
        chosen = np.flatnonzero(self.spans[:, 1] == 1)
        if not chosen.size:
            return None
        device = self.tables.device
        lengths = upload(self.spans[chosen, 2], device)
        if len(chosen) == len(self.spans):
            return Decodes(None, self.tables, lengths)
        return Decodes(upload(self.spans[chosen, 0], device), self.tables[upload(chosen, device)], lengths)

    @cached_property
    def prefills(self) -> list[Prefill]:
        """The sequences with several new tokens, for the torch path."""
        chosen = np.flatnonzero(self.spans[:, 1] > 1)
        spans = ((index, *self.spans[index].tolist()) for index in chosen)
        return [Prefill(start, count, length, self.tables[index]) for index, start, count, length in spans]


def write_cache(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Put key and value [tokens, kv_heads, head_dim] into slots [tokens] of the arenas, converting to their dtype."""
    if pointwise.write_cache(keys, values, slots, key, value):
        return
    for arena, new in ((keys, key), (values, value)):
        arena[slots // arena.shape[2], :, slots % arena.shape[2]] = new.to(arena.dtype)


def enter_cache(
    turned: torch.Tensor,
    value: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys, put keys and values into slots [tokens] of the arenas; returns the queries.

    turned [tokens, heads + kv_heads, head_dim], queries before keys, may be changed; value [tokens, kv_heads,
    head_dim]; angles cos and sin [tokens, 1, dim / 2], or None -> [tokens, heads, head_dim].
    """
    if (fused := fused_kernels_for(turned, keys)) is not None:
        entered: torch.Tensor = fused.enter_cache(turned, value, angles, keys, values, slots)
        return entered
    if angles is not None:
        turned = rotate(turned, *angles)
    heads = turned.shape[1] - value.shape[1]
    write_cache(keys, values, slots, turned[:, heads:], value)
    return turned[:, :heads]


def paged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int | None
) -> torch.Tensor:
    """query [tokens, heads, head_dim], arenas [blocks, kv_heads, block_tokens, head_dim] -> [tokens, heads, head_dim].

    Softmax and sums in float32; scale 1 / sqrt(head_dim).
    """
    if paged.can_attend(query, keys, values):
        return batch.tasks(query.shape[1] // keys.shape[1]).attend(query, keys, values, window)
    decodes = batch.decodes
    if decodes is not None and decodes.rows is None:
        return _decode(query, keys, values, decodes, window)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if decodes is not None:
        output[decodes.rows] = _decode(query[decodes.rows], keys, values, decodes, window)
    for prefill in batch.prefills:
        rows = slice(prefill.start, prefill.start + prefill.count)
        output[rows] = _prefill(query[rows], keys, values, prefill, window)
    return output


def _decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Decodes, window: int | None
) -> torch.Tensor:
    if (fused := fused_kernels_for(query, keys)) is not None:
        mixed: torch.Tensor = fused.paged_decode(query, keys, values, batch.block_tables, batch.lengths, window)
        return mixed
    count, heads, dim = query.shape
    kv_heads = keys.shape[1]
    # The query heads of a KV head take the place of query positions: [n, kv_heads, group, head_dim].
    q = query.reshape(count, kv_heads, heads // kv_heads, dim)
    # [n, blocks, kv_heads, block_tokens, head_dim] -> [n, kv_heads, slots, head_dim]
    k, v = (
        arena[batch.block_tables].transpose(1, 2).reshape(count, kv_heads, -1, dim).to(q.dtype)
        for arena in (keys, values)
    )
    mask = batch.mask(window, k.shape[2])
    # What is not seen is of other sequences, or of nobody: times a weight of zero a NaN in it would still be one.
    is_hidden = ~mask.transpose(2, 3)
    k, v = k.masked_fill(is_hidden, 0), v.masked_fill(is_hidden, 0)
    output = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if q.is_cpu:
        output = output + (_nothing(q).sum(3, keepdim=True) + _nothing(k).sum((2, 3))[:, :, None, None])
    return output.reshape(count, heads, dim)


def _prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Prefill, window: int | None
) -> torch.Tensor:
    heads, dim = query.shape[1:]
    kv_heads = keys.shape[1]
    # [1, heads, tokens, head_dim]
    q = query.transpose(0, 1).unsqueeze(0)
    # [blocks, kv_heads, block_tokens, head_dim] -> [1, kv_heads, length, head_dim]
    k, v = (
        arena[batch.block_table].transpose(0, 1).reshape(1, kv_heads, -1, dim)[:, :, : batch.length].to(q.dtype)
        for arena in (keys, values)
    )
    is_grouped = heads != kv_heads
    is_whole = window is None or window >= batch.length
    if is_whole and batch.count == batch.length:
        output = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
    elif is_whole and q.is_cuda:
        # Flash attention knows a chunk's triangle by itself; a mask would shut it out. Imported only here: it loads all
        # of torch's compiler, which takes as long as torch itself.
        from torch.nn.attention.bias import causal_lower_right

        bias = causal_lower_right(batch.count, batch.length)
        output = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=is_grouped)
    else:
        output = functional.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask(window), enable_gqa=is_grouped)
    if q.is_cpu:
        of_keys = _nothing(k).sum((2, 3)).repeat_interleave(heads // kv_heads, dim=1)
        output = output + (_nothing(q).sum(3, keepdim=True) + of_keys[:, :, None, None])
    return output[0].transpose(0, 1)


def _nothing(x: torch.Tensor) -> torch.Tensor:
    """0 for each number, NaN for what is none: on CPUs torch takes scores that are all NaN for hidden ones."""
    return x - x
