"""How the stages of a replica share the layers, and the ranks of a stage its heads and channels. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lepton_dist.plan.axes import ModelShape, split


@dataclass(frozen=True)
class LayerCost:
    """A stage takes ``fixed_s + layers * layer_s`` and may hold `most` layers at most."""

    fixed_s: float
    layer_s: float
    most: int

    def seconds(self, layers: int) -> float:
        """Of a step."""
        return self.fixed_s + layers * self.layer_s


def divide_layers(stages: Sequence[LayerCost], num_layers: int, *, minimises_sum: bool = False) -> list[int] | None:
    """Layers of each stage, at least one: the slowest stage as fast as can be, or the sum of all; None if none fits.

    A layer at a time goes to the stage that is the fastest with it (for the sum: that adds least). That is exact for
    times that grow with the layers: of the plans that hold as many layers, none has a faster slowest stage.
    """
    counts = [1] * len(stages)
    left = num_layers - len(stages)
    if left < 0 or any(stage.most < 1 for stage in stages):
        return None

    def key(index: int) -> float:
        return stages[index].layer_s if minimises_sum else stages[index].seconds(counts[index] + 1)

    heap = [(key(index), index) for index, stage in enumerate(stages) if stage.most > 1]
    heapq.heapify(heap)
    while left:
        if not heap:
            return None
        _, index = heapq.heappop(heap)
        counts[index] += 1
        left -= 1
        if counts[index] < stages[index].most:
            heapq.heappush(heap, (key(index), index))
    return counts


def choose_shares(
    speeds: Sequence[float], shape: ModelShape, seconds: Callable[[tuple[float, ...]], float]
) -> tuple[float, ...]:
    """Shares of the ranks of a stage: equal, or in proportion to speed as the model's heads can follow it.

    Heads move as whole (with few KV heads that is coarse), so shares that follow the heads' rounding are tried beside
    the exact ones, and `seconds` of a step says which is best; ties go to equal shares.
    """
    count = len(speeds)
    equal = (1.0,) * count
    if len(set(speeds)) == 1:
        return equal
    total = sum(speeds)
    exact = tuple(round(count * speed / total, 3) for speed in speeds)
    softer = tuple(round((share + 1.0) / 2, 3) for share in exact)
    tried = [equal, exact, softer]
    units = shape.num_kv_heads if count <= shape.num_kv_heads else shape.num_heads
    for shares in (exact, softer):
        tried.extend(_rounded(units, shares))
    return min(dict.fromkeys(tried), key=seconds)


def _rounded(units: int, shares: tuple[float, ...]) -> list[tuple[float, ...]]:
    """Shares as whole units, and those with one unit moved from one rank to another."""
    counts = [span.size for span in split(units, shares)]
    found = [tuple(map(float, counts))]
    if len(counts) > 8:
        return found
    for giver, has in enumerate(counts):
        for taker in range(len(counts)):
            if has > 1 and taker != giver:
                moved = list(counts)
                moved[giver] -= 1
                moved[taker] += 1
                found.append(tuple(map(float, moved)))
    return found
