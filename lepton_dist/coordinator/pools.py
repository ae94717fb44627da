"""Ranks that are interchangeable, gathered: the planner chooses among pools, not among permutations. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby

from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.plan.plan import Replica, Stage

_JOINED = (2, 3, 4)  # cells that one tensor-parallel group may span
_ALL_WIDTHS_UP_TO = 4
_FEW_NODES, _FEW_RANKS = 4, 16  # a cluster so small has all its nodes put together in all ways


@dataclass(frozen=True)
class Pool:
    """Cells of ranks, each inside one node, with equal kinds in equal order. `kinds` are numbers of `kind_numbers`."""

    cells: tuple[tuple[int, ...], ...]
    kinds: tuple[int, ...]

    @property
    def cell_size(self) -> int:
        """Ranks of a cell."""
        return len(self.kinds)

    @property
    def size(self) -> int:
        """Ranks in all."""
        return len(self.cells) * self.cell_size

    def widths(self, most: int) -> list[int]:
        """Tensor-parallel widths that its ranks divide into: parts of a cell (a cell of unlike ranks only whole)."""
        cell = self.cell_size
        parts = [
            width
            for width in range(1, cell + 1)
            if width == cell or (len(set(self.kinds)) == 1 and (cell % width == 0 or cell <= _ALL_WIDTHS_UP_TO))
        ]
        joined = [cell * count for count in _JOINED if count <= len(self.cells)]
        return [width for width in (*parts, *joined) if width <= most]

    def room(self, width: int) -> int:
        """Groups of this width that fit."""
        if width > self.cell_size:
            return len(self.cells) // (width // self.cell_size)
        return len(self.cells) * (self.cell_size // width)


@dataclass(frozen=True)
class Segment:
    """Stages of a replica in a row: `count` groups of `width` ranks of a pool."""

    pool: int
    width: int
    count: int


Shape = tuple[Segment, ...]
"""A replica before its ranks are chosen."""


def layouts(cluster: Cluster, kinds: Sequence[int]) -> list[tuple[Pool, ...]]:
    """Ways to see the cluster as pools.

    A node's unlike ranks together as one cell, or apart by kind; of a few nodes, any of them together as one cell.
    """
    by_node: dict[int, list[int]] = {}
    for rank, profile in enumerate(cluster.ranks):
        by_node.setdefault(profile.node, []).append(rank)

    def ordered(ranks: Iterable[int]) -> list[int]:
        return sorted(ranks, key=lambda rank: (kinds[rank], rank))

    nodes = list(by_node.values())
    apart = [tuple(same) for ranks in nodes for _, same in groupby(ordered(ranks), key=kinds.__getitem__)]
    is_small = len(nodes) <= _FEW_NODES and len(kinds) <= _FEW_RANKS
    groupings = list(_partitions(nodes)) if is_small else [[[ranks] for ranks in nodes]]
    cells = [[tuple(ordered(chain(*joined))) for joined in grouping] for grouping in groupings]
    return list(dict.fromkeys(_pools(some, kinds) for some in (*cells, apart)))


def _partitions(nodes: Sequence[list[int]]) -> Iterator[list[list[list[int]]]]:
    """All ways to put nodes together, by what is left of them."""
    if not nodes:
        yield []
        return
    for rest in _partitions(nodes[1:]):
        yield [[nodes[0]], *rest]
        for index, group in enumerate(rest):
            yield [*rest[:index], [nodes[0], *group], *rest[index + 1 :]]


def _pools(cells: Sequence[tuple[int, ...]], kinds: Sequence[int]) -> tuple[Pool, ...]:
    alike: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for cell in cells:
        alike.setdefault(tuple(kinds[rank] for rank in cell), []).append(cell)
    return tuple(Pool(tuple(members), signature) for signature, members in alike.items())


@dataclass
class Seating:
    """Gives ranks of pools to replicas, group by group; cells are filled one after the other."""

    pools: Sequence[Pool]
    _free: Mapping[int, list[list[int]]] = field(init=False)

    def __post_init__(self) -> None:
        self._free = {index: [list(cell) for cell in pool.cells] for index, pool in enumerate(self.pools)}

    def seat(self, shape: Shape) -> list[tuple[int, ...]] | None:
        """The ranks of each stage; None, and nothing is taken, when there is no room."""
        taken: list[tuple[list[int], tuple[int, ...]]] = []
        stages = []
        for segment in shape:
            for _ in range(segment.count):
                parts = self._take(segment)
                if parts is None:
                    for cell, ranks in reversed(taken):
                        cell[:0] = ranks
                    return None
                taken += parts
                stages.append(tuple(rank for _, ranks in parts for rank in ranks))
        return stages

    def _take(self, segment: Segment) -> list[tuple[list[int], tuple[int, ...]]] | None:
        size = self.pools[segment.pool].cell_size
        per_cell, cells_needed = min(segment.width, size), max(1, segment.width // size)
        found = [cell for cell in self._free[segment.pool] if len(cell) >= per_cell][:cells_needed]
        if len(found) < cells_needed:
            return None
        parts = [(cell, tuple(cell[:per_cell])) for cell in found]
        for cell, ranks in parts:
            del cell[: len(ranks)]
        return parts


def as_replica(
    stages: Sequence[tuple[int, ...]], layers: Sequence[int], shares: Sequence[tuple[float, ...]]
) -> Replica:
    """A replica of the plan from what was chosen for each stage."""
    return Replica(
        tuple(Stage(ranks, count, share) for ranks, count, share in zip(stages, layers, shares, strict=True))
    )
