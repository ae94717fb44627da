"""Dividing axes among the ranks of a stage: everything held, nobody empty, as near to the shares as units allow."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lepton_dist.plan.axes import Axis, ModelShape, Span, shard_axes, span_size, split

shares_lists = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def covered(spans: list[Span]) -> list[int]:
    return [index for span in spans for index in range(span.start, span.stop)]


@given(shares=shares_lists, extra=st.integers(0, 500))
def test_split_covers_everything_in_order(shares: list[int], extra: int) -> None:
    total = len(shares) + extra
    spans = split(total, shares)
    assert covered(spans) == list(range(total))
    assert all(span.size >= 1 for span in spans)
    ideal = [total * share / sum(shares) for share in shares]
    # Within one unit of the share, unless somebody had to be given a whole unit for less than one.
    if min(ideal) >= 1:
        assert all(abs(span.size - value) < 1 for span, value in zip(spans, ideal, strict=True))


@given(shares=shares_lists, factor=st.sampled_from([0.5, 3.0, 1e-3, 1e6]), extra=st.integers(0, 200))
def test_only_the_proportions_of_shares_count(shares: list[int], factor: float, extra: int) -> None:
    total = len(shares) + extra
    assert split(total, shares) == split(total, [share * factor for share in shares])


@given(shares=shares_lists, total=st.integers(8, 300))
def test_a_larger_share_never_holds_less(shares: list[int], total: int) -> None:
    sizes = [span.size for span in split(total, shares)]
    for i, one in enumerate(shares):
        for j, other in enumerate(shares):
            assert one <= other or sizes[i] >= sizes[j]


@pytest.mark.parametrize(
    ("total", "shares", "sizes"),
    [
        (7, [1, 1], [4, 3]),
        (10, [2, 1], [7, 3]),
        (3, [100, 1, 1], [1, 1, 1]),
        (8, [1, 1, 1], [3, 3, 2]),
        (32, [3, 1], [24, 8]),
    ],
)
def test_split_examples(total: int, shares: list[int], sizes: list[int]) -> None:
    assert [span.size for span in split(total, shares)] == sizes


@st.composite
def shapes(draw: st.DrawFn) -> tuple[ModelShape, list[int]]:
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    heads = kv_heads * group
    shares = draw(st.lists(st.integers(1, 9), min_size=1, max_size=min(8, heads)))
    ffn = draw(st.integers(len(shares), 3000))
    vocab = draw(st.integers(len(shares), 3000))
    return ModelShape(4, 64, heads, kv_heads, 8, ffn, vocab), shares


@given(shapes())
def test_every_rank_gets_its_part_of_every_axis(case: tuple[ModelShape, list[int]]) -> None:
    shape, shares = case
    held = shard_axes(shape, shares)
    assert len(held) == len(shares)
    for axis, total in ((Axis.HEADS, shape.num_heads), (Axis.FFN, shape.ffn), (Axis.VOCAB, shape.vocab)):
        spans = [span for rank in held for span in rank[axis]]
        assert covered(spans) == list(range(total)), axis
        assert all(span_size(rank[axis]) >= 1 for rank in held), axis


@given(shapes())
def test_every_query_head_finds_its_kv_head(case: tuple[ModelShape, list[int]]) -> None:
    """Attention takes equal groups: local query head i uses local KV head i // (heads / kv_heads)."""
    shape, shares = case
    group = shape.num_heads // shape.num_kv_heads
    for rank in shard_axes(shape, shares):
        heads, kv_heads = covered(list(rank[Axis.HEADS])), covered(list(rank[Axis.KV_HEADS]))
        assert len(heads) % len(kv_heads) == 0
        local_group = len(heads) // len(kv_heads)
        for local, head in enumerate(heads):
            assert kv_heads[local // local_group] == head // group


@given(shapes())
def test_kv_heads_are_copied_only_when_ranks_outnumber_them(case: tuple[ModelShape, list[int]]) -> None:
    shape, shares = case
    held = [covered(list(rank[Axis.KV_HEADS])) for rank in shard_axes(shape, shares)]
    if len(shares) <= shape.num_kv_heads:
        assert sorted(head for rank in held for head in rank) == list(range(shape.num_kv_heads))
    assert {head for rank in held for head in rank} == set(range(shape.num_kv_heads))


@given(shares=shares_lists, total=st.integers(64, 4000))
def test_channels_stay_near_their_shares(shares: list[int], total: int) -> None:
    """Alignment to whole units of up to 64 costs no rank more than it must."""
    shape = ModelShape(1, 64, 8, 8, 8, total, total)
    held = shard_axes(shape, shares)
    for rank, share in zip(held, shares, strict=True):
        ideal = total * share / sum(shares)
        # A unit is at most an eighth of an even part; rounding moves a part by less than one, the ragged end as much.
        unit = max(1, total / (8 * len(shares)))
        assert abs(span_size(rank[Axis.FFN]) - ideal) <= 2 * unit + len(shares)
