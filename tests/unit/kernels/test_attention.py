"""Paged attention against a dense one in float64, whatever the blocks, windows and groups."""

from __future__ import annotations

import math
from contextlib import nullcontext

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lepton_dist.kernels.attention import PagedBatch, paged_attention, write_cache
from tests.plain_torch import plain_torch

KV_HEADS, BLOCK_TOKENS, NUM_BLOCKS = 2, 4, 40


def dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
    """The last `query.shape[0]` positions of a sequence, head by head: [count, heads, dim] float64."""
    count, heads, dim = query.shape
    length = keys.shape[0]
    output = torch.zeros(count, heads, dim, dtype=torch.float64)
    for row in range(count):
        position = length - count + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            k = keys[first : position + 1, head // (heads // KV_HEADS)].double()
            v = values[first : position + 1, head // (heads // KV_HEADS)].double()
            weights = (k @ query[row, head].double() / math.sqrt(dim)).softmax(dim=0)
            output[row, head] = weights @ v
    return output


@settings(max_examples=120)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 22), st.integers(1, 22)), min_size=1, max_size=5),
    group=st.sampled_from([1, 3, 8]),
    dim=st.sampled_from([6, 16, 40]),  # multiples of 8 take the compiled kernel, where it was built
    window=st.sampled_from([None, 1, 5, 22, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
    is_plain=st.booleans(),
)
def test_a_batch_of_prefills_and_decodes(
    sequences: list[tuple[int, int]],
    group: int,
    dim: int,
    window: int | None,
    dtype: torch.dtype,
    seed: int,
    is_plain: bool,
) -> None:
    with plain_torch() if is_plain else nullcontext():
        check_batch(sequences, group, dim, window, dtype, seed)


def check_batch(
    sequences: list[tuple[int, int]], group: int, dim: int, window: int | None, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # What no sequence of the batch wrote, another may have left, and it may be no number: it must never be read.
    arenas = [torch.full((NUM_BLOCKS, KV_HEADS, BLOCK_TOKENS, dim), math.nan, dtype=dtype) for _ in range(2)]
    free = torch.randperm(NUM_BLOCKS, generator=generator)
    slots, spans, owned, expected = [], [], [], []
    start = taken = 0
    queries = []
    for length, asked in sequences:
        count = min(asked, length)
        num_blocks = -(-length // BLOCK_TOKENS)
        table = free[taken : taken + num_blocks]
        taken += num_blocks
        keys, values = (torch.randn(length, KV_HEADS, dim, generator=generator).to(dtype) for _ in range(2))
        position = torch.arange(length)
        where = table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
        write_cache(*arenas, where, keys, values)
        query = torch.randn(count, KV_HEADS * group, dim, generator=generator).to(dtype)
        queries.append(query)
        slots.append(where[length - count :])
        expected.append(dense(query, keys, values, window))
        spans.append((start, count, length))
        owned.append(table)
        start += count
    tables = torch.zeros(len(sequences), max(map(len, owned)), dtype=torch.int64)
    for row, table in enumerate(owned):
        tables[row, : len(table)] = table
    batch = PagedBatch(torch.cat(slots), np.array(spans, dtype=np.int64), tables)
    found = paged_attention(torch.cat(queries), arenas[0], arenas[1], batch, window)
    # float32 sums of up to 22 terms; bfloat16 rounds the result, of size 1, and perhaps the weights, to 8 bits.
    atol = 2e-6 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.double(), torch.cat(expected), atol=atol, rtol=0 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_converts_what_it_is_given(dtype: torch.dtype) -> None:
    arenas = [torch.zeros(2, KV_HEADS, BLOCK_TOKENS, 6, dtype=torch.bfloat16) for _ in range(2)]
    new = [torch.randn(3, KV_HEADS, 6, dtype=dtype) for _ in range(2)]
    write_cache(*arenas, torch.tensor([6, 0, 3]), *new)
    for arena, values in zip(arenas, new, strict=True):
        assert torch.equal(arena[1, :, 2], values[0].to(torch.bfloat16))
        assert torch.equal(arena[0, :, 3], values[2].to(torch.bfloat16))
        assert not arena[1, :, 3].any()
