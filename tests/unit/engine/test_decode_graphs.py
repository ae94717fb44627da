"""What of captured decode steps needs no GPU: their sizes, and how a batch fills the static fields."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import make_batch
from lepton_dist.engine.decode_graphs import bucket_sizes, pack_fields
from lepton_dist.engine.kv_cache import lay_out
from lepton_dist.engine.request import Request, Sequence
from lepton_dist.engine.scheduler import Chunk

BLOCK = 4


def decoding(index: int, length: int, blocks: list[int], *, is_long: bool = False) -> Chunk:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
    sequence = Sequence(Request(str(index), list(range(100, 100 + length)), sampling), 0, index, is_long)
    sequence.block_table.extend(blocks)
    return Chunk(sequence, length - 1, 1, samples=True, scores_prompt=False)


@given(st.integers(1, 600))
def test_every_batch_has_a_size_that_pads_by_a_quarter_at_most(most: int) -> None:
    sizes = bucket_sizes(most)
    assert sizes[0] == 1 and sizes[-1] == most and sizes == sorted(set(sizes))
    for before, size in pairwise(sizes):
        assert size - before - 1 <= max(before // 4, before if before < 8 else 0)


def test_the_fields_of_a_batch_and_of_its_padding() -> None:
    batch = make_batch(0, [decoding(0, 6, [3, 9]), decoding(1, 1, [5], is_long=True)])
    fields = pack_fields(batch, lay_out(batch, BLOCK), 4, spare_slot=77)
    assert fields.dtype == np.int32
    assert fields.tolist() == [
        [5, 0, 0, 0],  # positions
        [9 * BLOCK + 1, 5 * BLOCK, 77, 77],  # slots: padding writes to the spare block
        [6, 1, 0, 0],  # lengths: padding attends to nothing
        [0, 1, 0, 0],  # long contexts
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_that_fills_its_size_has_no_padding(count: int) -> None:
    batch = make_batch(0, [decoding(index, 2, [index]) for index in range(count)])
    assert 77 not in pack_fields(batch, lay_out(batch, BLOCK), count, spare_slot=77)
