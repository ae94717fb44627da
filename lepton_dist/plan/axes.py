"""Logical axes, and how a stage's shares divide them among its ranks.

A layer names the axes of its weights; this file says which part of each axis a rank holds. Attention heads are
divided by whole KV groups while there are enough of them; with more ranks than KV heads, query heads are divided
and a KV head is held by every rank whose query heads need it (GQA, arXiv:2305.13245).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Axis(StrEnum):
    """A named dim of a parameter."""

    EMBED = "embed"
    HEADS = "heads"
    KV_HEADS = "kv_heads"
    FFN = "ffn"
    VOCAB = "vocab"


@dataclass(frozen=True)
class ModelShape:
    """The sizes that sharding needs to know."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int


@dataclass(frozen=True)
class Span:
    """Half-open range of indices on an axis."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Indices in the range."""
        return self.stop - self.start

    def scaled(self, unit: int) -> Span:
        """The same range in smaller units, `unit` to an index."""
        return Span(self.start * unit, self.stop * unit)


AxisSpans = Mapping[Axis, tuple[Span, ...]]
"""What one rank holds of each sharded axis: spans in order, a KV head perhaps twice. An absent axis is held whole."""


def span_size(spans: Sequence[Span]) -> int:
    """Indices held, counted with their repetitions."""
    return sum(span.size for span in spans)


def split(total: int, shares: Sequence[float]) -> list[Span]:
    """Divide `total` units in proportion to `shares`, each part at least one unit (largest remainder method).

    Needs ``total >= len(shares)`` and positive shares. The parts are contiguous, in order, and cover everything.
    """
    weight = sum(shares)
    ideal = [total * share / weight for share in shares]
    counts = [max(1, int(value)) for value in ideal]
    while sum(counts) > total:
        largest = max(range(len(counts)), key=lambda i: (counts[i] > 1, counts[i] - ideal[i], -i))
        counts[largest] -= 1
    while sum(counts) < total:
        neediest = max(range(len(counts)), key=lambda i: (ideal[i] - counts[i], -i))
        counts[neediest] += 1
    spans, start = [], 0
    for count in counts:
        spans.append(Span(start, start + count))
        start += count
    return spans


def shard_axes(shape: ModelShape, shares: Sequence[float]) -> list[AxisSpans]:
    """What each rank of a stage holds of each axis, for the shares of that stage."""
    heads, kv_heads = _split_heads(shape, shares)
    ffn = _split_aligned(shape.ffn, shares)
    vocab = _split_aligned(shape.vocab, shares)
    return [
        {Axis.HEADS: (heads[i],), Axis.KV_HEADS: kv_heads[i], Axis.FFN: (ffn[i],), Axis.VOCAB: (vocab[i],)}
        for i in range(len(shares))
    ]


def _split_aligned(total: int, shares: Sequence[float], unit: int = 64) -> list[Span]:
    """Split by whole units of 64, where kernels are fastest, as long as that moves no share by more than an eighth."""
    while unit > 1 and total // unit < 8 * len(shares):
        unit //= 2
    blocks = split(-(-total // unit), shares)
    return [Span(block.start * unit, min(block.stop * unit, total)) for block in blocks]


def _split_heads(shape: ModelShape, shares: Sequence[float]) -> tuple[list[Span], list[tuple[Span, ...]]]:
    group = shape.num_heads // shape.num_kv_heads
    if len(shares) <= shape.num_kv_heads:
        kv = split(shape.num_kv_heads, shares)
        return [span.scaled(group) for span in kv], [(span,) for span in kv]
    heads = split(shape.num_heads, shares)
    return heads, [_kv_heads_of(span, group) for span in heads]


def _kv_heads_of(heads: Span, group: int) -> tuple[Span, ...]:
    """The KV heads behind a span of query heads, so that every local KV head serves equally many local query heads."""
    owners = [head // group for head in range(heads.start, heads.stop)]
    distinct = sorted(set(owners))
    if all(owners.count(owner) == owners.count(distinct[0]) for owner in distinct):
        return (Span(distinct[0], distinct[-1] + 1),)
    return tuple(Span(owner, owner + 1) for owner in owners)
