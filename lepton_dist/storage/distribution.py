"""Who reads which piece of the checkpoint, so that every byte leaves the file system once. Pure.

Ranks of different replicas need the same or overlapping rectangles of a tensor. The rectangles are cut at one
another's edges; each resulting piece has one reader, which passes it on to the other ranks that need it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lepton_dist.plan.axes import Span


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of a stored tensor (in stored orientation); ``columns`` is None for a vector."""

    source: str
    rows: Span
    columns: Span | None


@dataclass(frozen=True)
class Piece:
    """A rectangle and the ranks that need it; the first of them reads it."""

    rectangle: Rectangle
    ranks: tuple[int, ...]


def cut_pieces(needs: Mapping[int, Sequence[Rectangle]]) -> dict[Rectangle, list[Piece]]:
    """Cut every needed rectangle into pieces that are needed whole by a fixed set of ranks.

    The reader's role is dealt out evenly: the set of ranks is rotated so that the one with fewest bytes so far reads.
    """
    row_cuts, column_cuts = _cuts(needs)
    owners: dict[Rectangle, set[int]] = {}
    parts: dict[Rectangle, list[Rectangle]] = {}
    for rank in sorted(needs):
        for whole in needs[rank]:
            if whole not in parts:
                parts[whole] = _cut(whole, row_cuts[whole.source], column_cuts.get(whole.source, []))
            for part in parts[whole]:
                owners.setdefault(part, set()).add(rank)
    load: dict[int, int] = dict.fromkeys(needs, 0)
    pieces: dict[Rectangle, Piece] = {}
    for part, ranks in owners.items():
        reader = min(ranks, key=lambda rank: (load[rank], rank))
        load[reader] += part.rows.size * (part.columns.size if part.columns else 1)
        pieces[part] = Piece(part, (reader, *sorted(ranks - {reader})))
    return {whole: [pieces[part] for part in cut] for whole, cut in parts.items()}


def _cuts(needs: Mapping[int, Sequence[Rectangle]]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    rows: dict[str, set[int]] = {}
    columns: dict[str, set[int]] = {}
    for rectangles in needs.values():
        for item in rectangles:
            rows.setdefault(item.source, set()).update((item.rows.start, item.rows.stop))
            if item.columns is not None:
                columns.setdefault(item.source, set()).update((item.columns.start, item.columns.stop))
    return {name: sorted(cuts) for name, cuts in rows.items()}, {name: sorted(cuts) for name, cuts in columns.items()}


def _cut(whole: Rectangle, row_cuts: list[int], column_cuts: list[int]) -> list[Rectangle]:
    rows = _cut_span(whole.rows, row_cuts)
    if whole.columns is None:
        return [Rectangle(whole.source, span, None) for span in rows]
    return [Rectangle(whole.source, span, column) for span in rows for column in _cut_span(whole.columns, column_cuts)]


def _cut_span(span: Span, cuts: list[int]) -> list[Span]:
    inner = cuts[bisect_right(cuts, span.start) : bisect_left(cuts, span.stop)]
    edges = [span.start, *inner, span.stop]
    return [Span(start, stop) for start, stop in pairwise(edges)]
