"""Cutting rectangles among readers: every rank gets each of its elements exactly once, and each is read once."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given

from lepton_dist.plan.axes import Span
from lepton_dist.storage.distribution import Piece, Rectangle, cut_pieces

EXTENT = 7


def spans(extent: int) -> st.SearchStrategy[Span]:
    pairs = st.tuples(st.integers(0, extent - 1), st.integers(1, extent))
    return pairs.filter(lambda pair: pair[0] < pair[1]).map(lambda pair: Span(*pair))


# A source is a matrix or a vector throughout, as a stored tensor is.
rectangles = st.one_of(
    st.builds(Rectangle, st.sampled_from(["a", "b"]), spans(EXTENT), spans(EXTENT)),
    st.builds(Rectangle, st.just("vector"), spans(EXTENT), st.none()),
)
needs = st.dictionaries(st.integers(0, 5), st.lists(rectangles, min_size=1, max_size=4), min_size=1, max_size=5)


def elements(rectangle: Rectangle) -> list[tuple[str, int, int]]:
    columns = rectangle.columns or Span(0, 1)
    return [
        (rectangle.source, row, column)
        for row in range(rectangle.rows.start, rectangle.rows.stop)
        for column in range(columns.start, columns.stop)
    ]


@given(needs)
def test_every_rectangle_is_covered_once_by_its_pieces(needed: dict[int, list[Rectangle]]) -> None:
    cut = cut_pieces(needed)
    for rank, wholes in needed.items():
        for whole in wholes:
            pieces = cut[whole]
            assert Counter(e for piece in pieces for e in elements(piece.rectangle)) == Counter(elements(whole))
            assert all(rank in piece.ranks for piece in pieces)


@given(needs)
def test_every_element_has_one_reader_and_reaches_exactly_who_needs_it(needed: dict[int, list[Rectangle]]) -> None:
    pieces: set[Piece] = {piece for found in cut_pieces(needed).values() for piece in found}
    read = Counter(element for piece in pieces for element in elements(piece.rectangle))
    assert set(read.values()) == {1}
    wanted: dict[tuple[str, int, int], set[int]] = {}
    for rank, wholes in needed.items():
        for whole in wholes:
            for element in elements(whole):
                wanted.setdefault(element, set()).add(rank)
    assert set(read) == set(wanted)
    for piece in pieces:
        assert len(set(piece.ranks)) == len(piece.ranks)
        for element in elements(piece.rectangle):
            assert set(piece.ranks) == wanted[element]


@given(needs)
def test_every_rank_cuts_alike(needed: dict[int, list[Rectangle]]) -> None:
    """Ranks cut on their own and then meet in broadcasts: the order of the mapping must not matter."""
    backwards = dict(reversed(list(needed.items())))
    assert list(cut_pieces(needed).items()) == list(cut_pieces(backwards).items())


def test_readers_take_turns() -> None:
    """Four replicas that need the same eight tensors read two each."""
    wholes = [Rectangle(f"tensor {index}", Span(0, 4), Span(0, 4)) for index in range(8)]
    cut = cut_pieces(dict.fromkeys(range(4), wholes))
    readers = Counter(piece.ranks[0] for pieces in cut.values() for piece in pieces)
    assert readers == {0: 2, 1: 2, 2: 2, 3: 2}
