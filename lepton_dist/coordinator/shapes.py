"""Which shapes of replicas are worth a price: pipelines of groups of one pool, or of several pools. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product

from lepton_dist.coordinator.pools import Pool, Segment, Shape

_ALL_DEPTHS_UP_TO = 16
_MIXED_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_MOST_MIXED = 400
_MOST_POOLS_MIXED = 4
_FRACTIONS = (1, 2, 4, 8, 16)


def uniform_shapes(pools: Sequence[Pool], num_layers: int, most_width: int) -> Iterator[Shape]:
    """Pipelines of like groups of one pool, in every depth that divides the layers in another way."""
    useful = set(range(1, min(num_layers, _ALL_DEPTHS_UP_TO) + 1))
    useful |= {-(-num_layers // part) for part in range(1, num_layers + 1)}
    for index, pool in enumerate(pools):
        for width in pool.widths(most_width):
            for depth in sorted(useful):
                if depth <= pool.room(width):
                    yield (Segment(index, width, depth),)


def mixed_shapes(pools: Sequence[Pool], num_layers: int, most_width: int) -> Iterator[Shape]:
    """Pipelines over several pools, in both orders: a few depths of each, and even parts of everything there is."""
    widths = [_few_widths(pool, most_width) for pool in pools]
    seen: set[Shape] = set()
    for shape in (*_parts_of_all(pools, widths), *_combined(pools, widths)):
        for ordered in (shape, shape[::-1]):
            depth = sum(segment.count for segment in ordered)
            if depth <= num_layers and ordered not in seen:
                seen.add(ordered)
                yield ordered
        if len(seen) >= _MOST_MIXED:
            return


def _few_widths(pool: Pool, most_width: int) -> list[int]:
    """The whole cell and a single rank; with few cells, all widths."""
    every = [width for width in pool.widths(most_width) if width <= pool.cell_size]
    return every if len(every) <= 2 else [every[0], every[len(every) // 2], every[-1]]


def _parts_of_all(pools: Sequence[Pool], widths: Sequence[Sequence[int]]) -> Iterator[Shape]:
    if len(pools) < 2 or any(not some for some in widths):
        return
    for part in _FRACTIONS:
        for pick in (0, -1):
            yield tuple(
                Segment(index, widths[index][pick], max(1, pool.room(widths[index][pick]) // part))
                for index, pool in enumerate(pools)
            )


def _combined(pools: Sequence[Pool], widths: Sequence[Sequence[int]]) -> Iterator[Shape]:
    """Small totals first."""
    found: list[Shape] = []
    for count in range(2, min(len(pools), _MOST_POOLS_MIXED) + 1):
        depths = _MIXED_DEPTHS if count == 2 else _MIXED_DEPTHS[:2]
        for chosen in combinations(range(len(pools)), count):
            for some in product(*(widths[index] for index in chosen)):
                for numbers in product(depths, repeat=count):
                    shape = tuple(Segment(*parts) for parts in zip(chosen, some, numbers, strict=True))
                    if all(s.count <= pools[s.pool].room(s.width) for s in shape):
                        found.append(shape)
    found.sort(key=lambda shape: sum(segment.count for segment in shape))
    yield from found
