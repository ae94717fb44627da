"""Triton kernels for one new token a sequence over a paged KV cache: split over the context, then combined.

Follows Flash-Decoding (Dao et al., 2023) over the blocks of PagedAttention (arXiv:2309.06180). The grid does not depend
on the lengths, which lie on the GPU: a captured launch serves every batch of its size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    query,
    keys,
    values,
    tables,
    lengths,
    partial,
    weights,
    scale,
    window,
    query_stride,
    table_stride,
    kv_heads,
    group,
    dim,
    num_splits,
    BLOCK_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """One part of one sequence's context, for the `group` query heads of one KV head.

    query [n, kv_heads * group, dim] with its heads side by side; keys and values are arenas [blocks, kv_heads,
    block_tokens, dim]; tables [n, blocks]; lengths [n], 0 for a row that is padding. Of each part p: partial float32
    [n, heads, num_splits, dim] holds softmax-weighted values that add up to weight one, and weights float32
    [n, heads, num_splits, 2] the largest score and the sum of exponentials. GROUP >= group, DIM >= dim.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0)
    # Parts are whole tiles, so that only the last one is cut.
    tiles = tl.cdiv(tl.cdiv(length - begin, TILE), num_splits)
    first = begin + part * tiles * TILE
    last = tl.minimum(first + tiles * TILE, length)
    channel = tl.arange(0, DIM)
    is_channel = channel < dim
    member = tl.arange(0, GROUP)
    head = kv_head * group + member
    is_query = (member < group)[:, None] & is_channel[None, :]
    q = tl.load(query + row * query_stride + head[:, None] * dim + channel[None, :], mask=is_query, other=0.0)
    largest = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    mixed = tl.zeros([GROUP, DIM], tl.float32)
    for start in range(first, last, TILE):
        position = start + tl.arange(0, TILE)
        is_seen = position < last
        block = tl.load(tables + row * table_stride + position // BLOCK_TOKENS, mask=is_seen, other=0).to(tl.int64)
        slot = (block * kv_heads + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS
        at = slot[:, None] * dim + channel[None, :]
        is_value = is_seen[:, None] & is_channel[None, :]
        k = tl.load(keys + at, mask=is_value, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        # Every tile has a position that is seen, so that this is a number.
        peak = tl.maximum(largest, tl.max(scores, axis=1))
        share = tl.exp(scores - peak[:, None])
        shrink = tl.exp(largest - peak)
        v = tl.load(values + at, mask=is_value, other=0.0).to(q.dtype)
        mixed = mixed * shrink[:, None] + tl.dot(share.to(q.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(share, axis=1)
        largest = peak
    heads = kv_heads * group
    place = (row * heads + head) * num_splits + part
    is_mine = member < group
    # An empty part has weight 0: the combination leaves it out.
    mean = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(partial + place[:, None] * dim + channel[None, :], mean, mask=is_query)
    tl.store(weights + place * 2, largest, mask=is_mine)
    tl.store(weights + place * 2 + 1, total, mask=is_mine)


@triton.jit
def combine_kernel(partial, weights, out, num_splits, dim, SPLITS: tl.constexpr, DIM: tl.constexpr):
    """One head of one sequence: the parts of `decode_kernel` -> out [n, heads, dim]. SPLITS >= num_splits."""
    place = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    channel = tl.arange(0, DIM)
    is_part = part < num_splits
    is_channel = channel < dim
    largest = tl.load(weights + (place * num_splits + part) * 2, mask=is_part, other=float("-inf"))
    total = tl.load(weights + (place * num_splits + part) * 2 + 1, mask=is_part, other=0.0)
    peak = tl.max(largest, axis=0)
    # A row that is padding has seen nothing: its peak is -inf, and its output zero.
    share = tl.where(total > 0.0, tl.exp(largest - tl.where(peak == float("-inf"), 0.0, peak)) * total, 0.0)
    at = (place * num_splits + part)[:, None] * dim + channel[None, :]
    means = tl.load(partial + at, mask=is_part[:, None] & is_channel[None, :], other=0.0)
    weight = tl.sum(share, axis=0)
    mixed = tl.sum(means * share[:, None], axis=0) / tl.where(weight == 0.0, 1.0, weight)
    tl.store(out + place * dim + channel, mixed.to(out.dtype.element_ty), mask=is_channel)
