"""The compiled decode attention against plain softmax attention in float64, over blocks in any order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lepton_dist.kernels.attention import PagedBatch, paged_attention
from lepton_dist.kernels.cpu.native import VectorLevel, native_library, vector_level
from lepton_dist.kernels.cpu.paged import can_attend
from tests.unit.kernels.levels import has_tiles
from tests.unit.kernels.paged import random_batch

BLOCK = 16
# One rounding of the output for bfloat16 (2^-9 of values below about 1); sums of a few hundred terms for float32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


def use_level(level: VectorLevel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels use these instructions, where this machine has them."""
    if vector_level() < level:
        pytest.skip(f"this machine has no {level.name}")
    monkeypatch.setattr("lepton_dist.kernels.cpu.paged.vector_level", lambda: level)


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: list[int], seen: range) -> torch.Tensor:
    """Softmax attention of one token [heads, dim] in float64."""
    heads, dim = query.shape
    group = heads // keys.shape[1]
    places = [(table[at // BLOCK], at % BLOCK) for at in seen]
    k = torch.stack([keys[block, :, inside] for block, inside in places]).double().repeat_interleave(group, dim=1)
    v = torch.stack([values[block, :, inside] for block, inside in places]).double().repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,thd->ht", query.double(), k) / math.sqrt(dim)
    return torch.einsum("ht,thd->hd", scores.softmax(dim=1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(32, 8, 64), (6, 2, 16), (7, 7, 32), (12, 1, 128), (3, 1, 256), (10, 2, 48), (4, 2, 80)]
)
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("level", [level for level in VectorLevel if level])
def test_decode_attention_equals_softmax(
    level: VectorLevel,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_level(level, monkeypatch)
    heads, kv_heads, dim = shape
    torch.manual_seed(heads + dim)
    lengths = [1, 15, 16, 17, 97]
    blocks = [list(chunk) for chunk in torch.randperm(7 * len(lengths)).view(len(lengths), 7).tolist()]
    keys = torch.randn(7 * len(lengths), kv_heads, BLOCK, dim).to(dtype)
    values = torch.randn_like(keys)
    # As in a batch: the query is a slice of the fused projection, so its rows are further apart than its width.
    query = torch.randn(len(lengths) + 1, heads + 2 * kv_heads, dim).to(dtype)[:, :heads]
    rows = [1, 2, 3, 4, 5]
    spans = np.array([(row, 1, length) for row, length in zip(rows, lengths, strict=True)])
    batch = PagedBatch(torch.empty(0, dtype=torch.int64), spans, torch.tensor(blocks))
    result = paged_attention(query, keys, values, batch, window)
    for index, length in enumerate(lengths):
        start = 0 if window is None else max(0, length - window)
        expected = exact(query[rows[index]], keys, values, blocks[index], range(start, length))
        assert (result[rows[index]].double() - expected).abs().max() < TOLERANCE[dtype] * max(1.0, expected.abs().max())


@pytest.mark.parametrize("lengths", [[300], [97] * 9, [400, 3], [65, 64, 63, 33, 1, 16, 17]])
@pytest.mark.parametrize("shape", [(32, 8, 64), (12, 4, 64), (24, 4, 32), (16, 16, 32), (20, 4, 48), (9, 3, 64)])
@pytest.mark.parametrize("level", [level for level in VectorLevel if level])
def test_kv_heads_taken_together_equal_those_taken_alone(
    level: VectorLevel, shape: tuple[int, int, int], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of decoding has a thread take as many KV heads at a time as keep all busy: their bits are the same."""
    use_level(level, monkeypatch)
    heads, kv_heads, dim = shape
    group = heads // kv_heads
    torch.manual_seed(len(lengths) + heads)
    keys, values, batch = random_batch([(1, length) for length in lengths], kv_heads, dim, BLOCK, torch.bfloat16)
    query = torch.randn(len(lengths), heads, dim).bfloat16()
    result = paged_attention(query, keys, values, batch, None)
    for head in range(kv_heads):
        span = slice(head * group, (head + 1) * group)
        arenas = (arena[:, head : head + 1].contiguous() for arena in (keys, values))
        alone = paged_attention(query[:, span].contiguous(), *arenas, batch, None)
        assert torch.equal(result[:, span], alone)
    for row, length in enumerate(lengths):
        expected = exact(query[row], keys, values, batch.tables[row].tolist(), range(length))
        limit = TOLERANCE[torch.bfloat16] * max(1.0, float(expected.abs().max()))
        assert (result[row].double() - expected).abs().max() < limit


@pytest.mark.parametrize("window", [None, 7, 33, 64])
@pytest.mark.parametrize("shape", [(8, 2, 64), (6, 6, 32), (5, 1, 128), (3, 1, 256), (4, 1, 96)])
@pytest.mark.parametrize("level", [level for level in VectorLevel if level])
def test_prompts_and_decoding_tokens_together(
    level: VectorLevel, shape: tuple[int, int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of any length behind caches of any length; what a block holds beyond its sequence is never looked at."""
    use_level(level, monkeypatch)
    heads, kv_heads, dim = shape
    torch.manual_seed(dim)
    spans = [(1, 1), (33, 33), (20, 70), (1, 65), (5, 31), (64, 64), (1, 32)]
    keys, values, batch = random_batch(spans, kv_heads, dim, BLOCK, torch.bfloat16)
    for row, (_, length) in enumerate(spans):
        if length % BLOCK:
            last = int(batch.tables[row, length // BLOCK])
            keys[last, :, length % BLOCK :] = values[last, :, length % BLOCK :] = math.nan
    query = torch.randn(sum(count for count, _ in spans), heads, dim).bfloat16()
    result = paged_attention(query, keys, values, batch, window)
    start = 0
    for row, (count, length) in enumerate(spans):
        for token in range(count):
            end = length - count + token + 1
            seen = range(0 if window is None else max(0, end - window), end)
            expected = exact(query[start + token], keys, values, batch.tables[row].tolist(), seen)
            # Weights and the result are rounded to 8 bits.
            limit = 2 * TOLERANCE[torch.bfloat16] * max(1.0, float(expected.abs().max()))
            assert (result[start + token].double() - expected).abs().max() < limit
        start += count


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    """A token gets the same bits alone, decoded behind its cache, as in its prompt."""
    if vector_level() < VectorLevel.AVX512:
        pytest.skip("this machine has no AVX512")
    torch.manual_seed(1)
    keys, values, batch = random_batch([(90, 90)], 2, 64, BLOCK, torch.bfloat16)
    query = torch.randn(90, 8, 64).bfloat16()
    together = paged_attention(query, keys, values, batch, None)
    for row in (0, 15, 16, 31, 32, 63, 89):
        alone = PagedBatch(torch.empty(0, dtype=torch.int64), np.array([(0, 1, row + 1)]), batch.tables)
        found = paged_attention(query[row : row + 1], keys, values, alone, None)[0]
        if has_tiles():  # many rows by matrix instructions, which sum in another order: a bit of 8 in weights or result
            torch.testing.assert_close(found, together[row], rtol=8e-3, atol=8e-3)
        else:
            assert torch.equal(found, together[row])


def test_the_compiled_kernel_was_used() -> None:
    if native_library() is None:
        pytest.skip("the compiled kernels were not built: no C compiler was found at installation")
    arenas = torch.zeros(2, 1, 2, BLOCK, 64)
    assert can_attend(torch.zeros(1, 4, 64), *arenas)
    assert not can_attend(torch.zeros(1, 4, 20), *arenas[..., :20].contiguous())


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_a_long_prompt_in_chunks_equals_softmax(cache_dtype: torch.dtype) -> None:
    """More tokens than a task takes, behind a prefix, with a cache of another dtype than the query."""
    torch.manual_seed(1)
    heads, kv_heads, dim, length, count = 8, 2, 64, 150, 77
    blocks = torch.randperm(10).tolist()
    keys, values = (torch.randn(10, kv_heads, BLOCK, dim).to(cache_dtype) for _ in range(2))
    query = torch.randn(count, heads, dim)
    spans = np.array([(0, count, length)])
    result = paged_attention(query, keys, values, PagedBatch(torch.empty(0), spans, torch.tensor([blocks])), None)
    for row in range(0, count, 7):
        expected = exact(query[row], keys, values, blocks, range(length - count + row + 1))
        assert (result[row].double() - expected).abs().max() < TOLERANCE[torch.float32]
