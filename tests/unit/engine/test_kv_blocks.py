"""Which blocks are used again, and in which order."""

from __future__ import annotations

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.kv_blocks import KvBlocks
from lepton_dist.engine.request import Request, Sequence


def computed(blocks: KvBlocks, tokens: list[int]) -> Sequence:
    """A sequence whose tokens are all in the cache."""
    sequence = Sequence(Request("a", tokens, SamplingParams(max_tokens=1)), 0, 0)
    assert blocks.extend(sequence, len(tokens))
    sequence.num_computed = len(tokens)
    blocks.publish(sequence)
    return sequence


def next_blocks(blocks: KvBlocks, count: int) -> list[int]:
    return list(computed(blocks, list(range(100, 100 + 4 * count))).block_table)


def test_without_prefixes_what_was_used_last_is_used_next() -> None:
    blocks = KvBlocks(8, 4, has_prefix_cache=False)
    first = computed(blocks, list(range(10)))
    held = list(first.block_table)
    blocks.release(first)
    assert next_blocks(blocks, 3) == held, "untouched blocks would take memory for nothing"


def test_blocks_that_hold_a_prefix_are_used_last_and_the_half_full_one_first() -> None:
    blocks = KvBlocks(6, 4)
    first = computed(blocks, list(range(10)))  # two full blocks, and one of two tokens
    full, half = first.block_table[:2], first.block_table[2]
    blocks.release(first)
    again = Sequence(Request("b", [*range(8), 50, 51], SamplingParams(max_tokens=1)), 0, 1)
    blocks.reuse_prefix(again)
    assert again.block_table == full
    blocks.release(again)
    order = next_blocks(blocks, 6)
    assert order[0] == half and order[4:] == [full[1], full[0]], "of a prefix the end goes before the beginning"
