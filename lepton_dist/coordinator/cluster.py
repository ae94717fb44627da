"""What `lepton-dist profile` measured of a cluster: every rank's rates, and the links between ranks. Pure.

Rates are those of ranks that compute at the same time as the others of their node, as they will in a run.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lepton_dist.errors import ConfigError
from lepton_dist.plan.precision import INT4_GROUPS

# A host whose rate is this much under the median of its twins is named; twins differ less than this in memory.
SLOWER_BY = 0.15
_SAME_MEMORY = 1.25

Curve = tuple[tuple[int, float], ...]
"""Measured points (x, y) with growing x, read on logarithmic axes."""


def interpolate(curve: Curve, x: float) -> float:
    """y at x: straight between the points on logarithmic axes, flat outside of them."""
    place = bisect_right(curve, x, key=_first)
    if place == 0:
        return curve[0][1]
    if place == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    return float(y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0)))


def _first(point: tuple[int, float]) -> int:
    return point[0]


@dataclass(frozen=True)
class Matmul:
    """Flops/s of a rank by dtype of the weights and by width, the number of tokens that are multiplied at once."""

    rates: Mapping[str, Curve]

    def flops_per_s(self, dtype: str, width: float) -> float:
        """The rate at this width, int4 in other groups as int4.

        Where `dtype` was not measured it is the best that a measured one reaches at any width. That leaves out how fast
        the weights are read, which depends on their bytes and is a term of its own.
        """
        curve = self.rates.get(dtype, self.rates.get("int4") if dtype in INT4_GROUPS else None)
        if curve is None:
            return max(rate for other in self.rates.values() for _, rate in other)
        return interpolate(curve, width)


@dataclass(frozen=True)
class RankProfile:
    """One rank: what it may use, and how fast it is.

    `memory_bytes_per_s` is the rate of reading memory; `attention_bytes_per_s` that of decode attention over bfloat16
    keys and values that four query heads share, `attention_flops_per_s` that of attention in prefill. The rest is what
    no weight explains: `step_s` of any step, `layer_s` of a layer, `sequence_s` of a sequence in a batch, `kv_head_s`
    of one KV head of one sequence in one layer, before it has many keys, `element_s` of one channel of one token in one
    layer (norms, rope, activations, residuals), `logit_s` of one logit of a sampled token.
    """

    rank: int
    host: str
    node: int
    device: str
    threads: int
    memory_bytes: int
    memory_bytes_per_s: float
    matmul: Matmul
    attention_bytes_per_s: float
    attention_flops_per_s: float
    step_s: float
    layer_s: float
    sequence_s: float
    kv_head_s: float = 0.0
    element_s: float = 0.0
    logit_s: float = 0.0

    @property
    def kind(self) -> tuple[Any, ...]:
        """Everything but where the rank is: ranks of equal kind are interchangeable."""
        curves = tuple(sorted(self.matmul.rates.items()))
        return (
            *(self.device, self.threads, self.memory_bytes, self.memory_bytes_per_s, curves),
            *(self.attention_bytes_per_s, self.attention_flops_per_s),
            *(self.step_s, self.layer_s, self.sequence_s, self.kv_head_s, self.element_s, self.logit_s),
        )


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes ``latency_s + n / bytes_per_s``."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Of one message."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class AllReduce:
    """A measured all-reduce of `num_ranks` ranks: seconds by bytes."""

    num_ranks: int
    seconds: Curve

    def seconds_for(self, num_bytes: float) -> float:
        """Flat below the smallest measured size, in proportion to the bytes above the largest."""
        largest, slowest = self.seconds[-1]
        if num_bytes > largest:
            return slowest * num_bytes / largest
        return interpolate(self.seconds, num_bytes)


@dataclass(frozen=True)
class SlowHost:
    """A host that is slower than the median of hosts with as many cores and as much memory."""

    host: str
    what: str
    rate: float
    median: float


_ITSELF = Link(0.0, math.inf)


@dataclass(frozen=True)
class Cluster:
    """The ranks in order, and what joins them.

    `pairs` are links of single pairs of nodes (smaller index first) that differ from `between_nodes`. `within_reduce`
    and `between_reduce` are measured all-reduces inside a node and over several.
    """

    name: str
    ranks: tuple[RankProfile, ...]
    within_node: Link
    between_nodes: Link
    pairs: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    within_reduce: AllReduce | None = None
    between_reduce: AllReduce | None = None

    @property
    def nodes(self) -> tuple[int, ...]:
        """The node of each rank."""
        return tuple(profile.node for profile in self.ranks)

    def link(self, rank_a: int, rank_b: int) -> Link:
        """What joins two ranks; a rank reaches itself at once."""
        if rank_a == rank_b:
            return _ITSELF
        a, b = self.ranks[rank_a].node, self.ranks[rank_b].node
        if a == b:
            return self.within_node
        return self.pairs.get((min(a, b), max(a, b)), self.between_nodes)

    def all_reduce_s(self, ranks: Sequence[int], num_bytes: float) -> float:
        """Seconds of an all-reduce over some ranks.

        As measured, where it was; another number of ranks takes as much longer as the textbook costs say.
        """
        if len(ranks) < 2:
            return 0.0
        is_inside = len({self.ranks[rank].node for rank in ranks}) == 1
        measured = self.within_reduce if is_inside else self.between_reduce
        if measured is None:
            return all_reduce_cost_s(self._slowest_link(ranks), len(ranks), num_bytes)
        if measured.num_ranks == len(ranks):
            return measured.seconds_for(num_bytes)
        link = self._slowest_link(ranks)
        scale = all_reduce_cost_s(link, len(ranks), num_bytes) / all_reduce_cost_s(link, measured.num_ranks, num_bytes)
        return measured.seconds_for(num_bytes) * scale

    def _slowest_link(self, ranks: Sequence[int]) -> Link:
        """Of the pairs of nodes that `ranks` lie on, the worst latency and the worst rate."""
        first = {self.ranks[rank].node: rank for rank in reversed(ranks)}
        chosen = sorted(first.values())
        if len(chosen) == 1:
            return self.within_node
        if not self.pairs:
            return self.between_nodes
        links = [self.link(a, b) for i, a in enumerate(chosen) for b in chosen[i + 1 :]]
        return Link(max(link.latency_s for link in links), min(link.bytes_per_s for link in links))

    def check(self, nodes: Sequence[int], source: str = "") -> None:
        """Whether this is the cluster of a job whose ranks lie on these nodes; `source` is the file that errors name.

        Raises:
            ConfigError: the job has another number of ranks, or places them otherwise.
        """
        if len(nodes) != len(self.ranks):
            raise ConfigError(
                f"the profile {self.name!r} has {len(self.ranks)} ranks, the job {len(nodes)}: profile this job's "
                f"machines (lepton-dist profile), or start {len(self.ranks)} ranks",
                key="hosts",
                place=source,
            )
        known, given = _grouping(self.nodes), _grouping(nodes)
        for rank, (mine, theirs) in enumerate(zip(known, given, strict=True)):
            if mine != theirs:
                raise ConfigError(
                    f"rank {rank} lies with rank {mine} in the profile {self.name!r}, with rank {theirs} in the job: "
                    "place the ranks on the nodes as they were profiled, or profile again",
                    key="hosts",
                    place=source,
                )

    def slow_hosts(self) -> list[SlowHost]:
        """Hosts with a rate more than 15 % under the median of their twins: same device, threads, memory, ranks."""
        return [slow for twins in _twins(self.ranks) for slow in _slow_among(twins)]


def all_reduce_cost_s(link: Link, num_ranks: int, num_bytes: float) -> float:
    """The better of recursive doubling and of Rabenseifner's algorithm, without the additions.

    Costs as in Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH, 2005.
    """
    rounds = math.ceil(math.log2(num_ranks))
    doubling = rounds * link.seconds(num_bytes)
    halving = 2 * rounds * link.latency_s + 2 * (num_ranks - 1) / num_ranks * num_bytes / link.bytes_per_s
    return min(doubling, halving)


def _grouping(nodes: Sequence[int]) -> list[int]:
    """The first rank of each rank's node: equal for layouts that differ only in the numbers of their nodes."""
    first: dict[int, int] = {}
    return [first.setdefault(node, rank) for rank, node in enumerate(nodes)]


def _twins(ranks: Sequence[RankProfile]) -> list[list[list[RankProfile]]]:
    """The ranks by node, and the nodes by what they are."""
    nodes: dict[int, list[RankProfile]] = {}
    for profile in ranks:
        nodes.setdefault(profile.node, []).append(profile)
    alike: dict[tuple[Any, ...], list[list[RankProfile]]] = {}
    for members in sorted(nodes.values(), key=_memory):
        shape = (len(members), members[0].device, tuple(sorted(profile.threads for profile in members)))
        alike.setdefault(shape, []).append(members)
    groups = []
    for same in alike.values():
        start = 0
        for index in range(1, len(same) + 1):
            if index == len(same) or _memory(same[index]) > _SAME_MEMORY * _memory(same[start]):
                groups.append(same[start:index])
                start = index
    return groups


def _memory(members: list[RankProfile]) -> int:
    return sum(profile.memory_bytes for profile in members)


def _slow_among(twins: list[list[RankProfile]]) -> list[SlowHost]:
    found = []
    rates = [_rates(members) for members in twins]
    for what in rates[0]:
        values = [rate[what] for rate in rates if what in rate]
        # The upper of two middle values: of two hosts the slower one is the one to name.
        median = statistics.median_high(values)
        for members, rate in zip(twins, rates, strict=True):
            if what in rate and rate[what] < (1 - SLOWER_BY) * median:
                found.append(SlowHost(members[0].host, what, rate[what], median))
    return found


def _rates(members: list[RankProfile]) -> dict[str, float]:
    """What a node's ranks do together, by what it is."""
    rates = {"memory bytes/s": sum(profile.memory_bytes_per_s for profile in members)}
    for dtype in members[0].matmul.rates:
        rates[f"{dtype} flops/s"] = sum(profile.matmul.rates[dtype][-1][1] for profile in members)
    return rates
