"""The last layer of a model computes the rows that are read, and gives them what all rows would have got."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import RunBatch, make_batch, read_rows
from lepton_dist.engine.kv_cache import CachedAttention, KvCache, lay_out
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.engine.request import Request, Sequence
from lepton_dist.engine.scheduler import Chunk
from lepton_dist.kernels.attention import PagedBatch, ReadRows
from lepton_dist.model.config import RopeConfig
from lepton_dist.model.decoder import Decoder
from lepton_dist.model.rope import RopeTables
from tests.unit.model.layer import BLOCK_TOKENS, HEAD_DIM, HIDDEN, KV_HEADS, layer

CPU = torch.device("cpu")
chunk = st.tuples(st.integers(0, 40), st.integers(1, 40), st.booleans(), st.booleans())
chunks = st.lists(chunk, min_size=1, max_size=5)


def batch_of(parts: list[tuple[int, int, bool, bool]]) -> RunBatch:
    """Chunks of (tokens before it, tokens, whether it samples, whether its prompt is scored)."""
    made, first_block = [], 0
    for index, (start, count, samples, scores) in enumerate(parts):
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=1 if scores else None)
        sequence = Sequence(Request(str(index), [1] * (start + count), sampling), 0, index)
        num_blocks = -(-(start + count) // BLOCK_TOKENS)
        sequence.block_table.extend(range(first_block, first_block + num_blocks))
        first_block += num_blocks
        made.append(Chunk(sequence, start, count, samples=samples, scores_prompt=scores))
    return make_batch(0, made)


def run_rows(
    decoder: Decoder, batch: RunBatch, rows: NDArray[np.int64] | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The residual stream of these rows or of all, and the cache, from inputs that are always the same."""
    torch.manual_seed(1)
    cache = KvCache(KvGeometry(len(decoder.layers), KV_HEADS, HEAD_DIM, BLOCK_TOKENS, torch.float32), 40)
    arenas = [arena for index in range(len(decoder.layers)) for arena in cache.arenas(index)]
    for arena in arenas:
        arena.normal_()
    layout = lay_out(batch, BLOCK_TOKENS)
    paged = layout.paged(CPU)
    read = None if rows is None else ReadRows(torch.from_numpy(rows), paged.of_rows(rows))
    hidden = torch.randn(batch.num_tokens, HIDDEN)
    positions = torch.from_numpy(layout.positions)
    return decoder.run_layers(hidden, positions, None, CachedAttention(cache, paged), read), arenas


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("num_layers", [1, 3])
@settings(max_examples=40, deadline=None)
@given(parts=chunks)
def test_rows_that_are_read_come_out_as_if_all_were(
    window: int | None, num_layers: int, parts: list[tuple[int, int, bool, bool]]
) -> None:
    decoder = Decoder(
        embedding=None,
        layers=[layer("float32", torch.float32, window=window) for _ in range(num_layers)],
        head=None,
        rope=RopeTables(RopeConfig(theta=10000.0, dim=HEAD_DIM), 128),
    )
    batch = batch_of(parts)
    rows = read_rows(batch)
    few, few_cache = run_rows(decoder, batch, rows)
    whole, whole_cache = run_rows(decoder, batch)
    # Products of another number of rows may add up in another order: some rounding errors of float32.
    torch.testing.assert_close(few, whole[rows], rtol=1e-5, atol=1e-5)
    for mine, wanted in zip(few_cache, whole_cache, strict=True):
        assert torch.equal(mine, wanted), "keys and values are those of all rows"


@settings(max_examples=100, deadline=None)
@given(chunks, st.randoms(use_true_random=False))
def test_each_row_sees_what_it_saw_in_its_batch(parts: list[tuple[int, int, bool, bool]], source: object) -> None:
    batch = batch_of(parts)
    layout = lay_out(batch, BLOCK_TOKENS)
    paged = layout.paged(CPU)
    picked = [row for row in range(batch.num_tokens) if source.random() < 0.4]  # type: ignore[attr-defined]
    rows = np.array(picked, dtype=np.int64)
    chosen = paged.of_rows(rows)
    assert torch.equal(chosen.slots, paged.slots[rows])
    assert seen(chosen) == [seen(paged)[row] for row in picked]
    spans = chosen.spans.tolist()
    assert [start for start, *_ in spans] == np.cumsum([0] + [count for _, count, _ in spans])[:-1].tolist()


def seen(batch: PagedBatch) -> list[tuple[int, tuple[int, ...]]]:
    """For each row how many tokens it sees, and the blocks that they are in."""
    found = []
    for (_, count, length), table in zip(batch.spans.tolist(), batch.tables.tolist(), strict=True):
        ends = range(length - count + 1, length + 1)
        found += [(end, tuple(table[: -(-end // BLOCK_TOKENS)])) for end in ends]
    return found
