"""How many replicas of which shape: the most value that a cluster's ranks can hold (a knapsack). Pure.

Exact on its grid: bounded knapsack over a vector of capacities, counts split into powers of two (Martello, Toth:
Knapsack Problems, 1990, section 3.1). Large clusters are put on a coarser grid, on which small items go in bundles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST_STATES = 20_000
_MOST_ITEMS = 48


@dataclass(frozen=True)
class Item:
    """Takes `use` of each capacity and is worth `value`."""

    use: tuple[int, ...]
    value: float


def best_counts(capacity: Sequence[int], items: Sequence[Item]) -> list[int]:
    """How often to take each item, so that their values add up to the most within the capacities."""
    chosen = _worth_trying(items)
    units = _grid(capacity)
    grid = tuple(have // unit for have, unit in zip(capacity, units, strict=True))
    passes: list[tuple[int, int, tuple[int, ...], np.ndarray]] = []
    best = np.zeros([size + 1 for size in grid])
    for index in chosen:
        item = items[index]
        fitting = min(have // use for use, have in zip(item.use, capacity, strict=True) if use)
        wanted = max(unit // use for use, unit in zip(item.use, units, strict=True) if use)
        bundle = max(1, min(wanted, fitting))
        need = tuple(-(-use * bundle // unit) for use, unit in zip(item.use, units, strict=True))
        most = min(have // asks for have, asks in zip(grid, need, strict=True) if asks)
        step = 1
        while most > 0:
            count = min(step, most)
            shift = tuple(count * asks for asks in need)
            target = best[tuple(slice(by, None) for by in shift)]
            source = best[tuple(slice(None, size + 1 - by) for size, by in zip(grid, shift, strict=True))]
            value = source + count * bundle * item.value
            is_better = value > target
            taken = np.zeros(best.shape, dtype=bool)
            taken[tuple(slice(by, None) for by in shift)] = is_better
            best = best.copy()
            np.copyto(best[tuple(slice(by, None) for by in shift)], value, where=is_better)
            passes.append((index, count * bundle, shift, taken))
            most -= count
            step *= 2
    counts = [0] * len(items)
    place = grid
    for index, count, shift, taken in reversed(passes):
        if taken[place]:
            counts[index] += count
            place = tuple(at - by for at, by in zip(place, shift, strict=True))
    return _filled(capacity, items, counts)


def _worth_trying(items: Sequence[Item]) -> list[int]:
    """Items that no other beats at every capacity, those worth most for what they take first."""
    kept: list[int] = []
    for index in sorted(range(len(items)), key=lambda i: (-items[i].value, sum(items[i].use))):
        item = items[index]
        is_beaten = any(all(a <= b for a, b in zip(items[other].use, item.use, strict=True)) for other in kept)
        if item.value > 0 and any(item.use) and not is_beaten:
            kept.append(index)
    return sorted(kept, key=lambda i: -items[i].value / sum(items[i].use))[:_MOST_ITEMS]


def _grid(capacity: Sequence[int]) -> list[int]:
    units = [1] * len(capacity)
    while math.prod(have // unit + 1 for have, unit in zip(capacity, units, strict=True)) > _MOST_STATES:
        largest = max(range(len(units)), key=lambda i: capacity[i] // units[i])
        units[largest] *= 2
    return units


def _filled(capacity: Sequence[int], items: Sequence[Item], counts: list[int]) -> list[int]:
    """What the grid left over goes to the items worth most for what they take."""
    left = [
        have - sum(count * item.use[axis] for count, item in zip(counts, items, strict=True))
        for axis, have in enumerate(capacity)
    ]
    worth = [index for index, item in enumerate(items) if item.value > 0 and any(item.use)]
    for index in sorted(worth, key=lambda i: -items[i].value / sum(items[i].use)):
        more = min(have // use for have, use in zip(left, items[index].use, strict=True) if use)
        counts[index] += more
        left = [have - more * use for have, use in zip(left, items[index].use, strict=True)]
    return counts
