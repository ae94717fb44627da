"""What the ranks of a job measured, made into a cluster. Facts in, cluster out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from lepton_dist.coordinator.cluster import AllReduce, Cluster, Link, Matmul, RankProfile
from lepton_dist.coordinator.stage_cost import WEIGHT_BYTES
from lepton_dist.errors import LeptonError
from lepton_dist.runtime.facts import PairTiming, RankFacts, ReduceCurve

# Ranks whose rates differ by less than this from the median of their kind are taken for equal: it is noise.
_NOISE = 0.1
# A pair of nodes that is this much slower or faster than the median one has a link of its own.
_OWN_LINK = 1.5
# Stands for a link that the job does not have: one rank, or one node.
_NO_LINK = Link(1e-3, 1e8)
_DIGITS = 4


def make_cluster(name: str, hosts: Sequence[str], nodes: Sequence[int], facts: Sequence[RankFacts]) -> Cluster:
    """The cluster that a job's ranks found; `hosts` and `nodes` are those of each rank."""
    ranks = [_profile(fact, hosts[fact.rank], nodes[fact.rank]) for fact in facts]
    pairs = [pair for fact in facts for pair in fact.pairs]
    inside = [pair for pair in pairs if nodes[pair.first] == nodes[pair.second]]
    between = [pair for pair in pairs if nodes[pair.first] != nodes[pair.second]]
    usual = _median_link(between)
    curves = [curve for fact in facts for curve in fact.reduces]
    return Cluster(
        name=name,
        ranks=tuple(_without_noise(ranks)),
        within_node=_median_link(inside),
        between_nodes=usual,
        pairs=_own_links(between, nodes, usual),
        within_reduce=_reduce([curve for curve in curves if curve.name == "node"]),
        between_reduce=_reduce([curve for curve in curves if curve.name == "job"]),
    )


def _profile(fact: RankFacts, host: str, node: int) -> RankProfile:
    compute = fact.compute
    if compute is None:
        raise LeptonError(f"rank {fact.rank} on {host} has not measured how fast it computes")
    # A matmul of one token reads every weight once: where that is faster than the sweep, memory is that fast.
    streamed = [WEIGHT_BYTES[kind] / 2 * points[0][1] for kind, points in compute.matmul.items()]
    return RankProfile(
        rank=fact.rank,
        host=host,
        node=node,
        device="cpu",
        threads=fact.threads,
        memory_bytes=fact.memory_bytes,
        memory_bytes_per_s=max(compute.memory_bytes_per_s, *streamed),
        matmul=Matmul(
            {kind: tuple((width, rate) for width, rate in points) for kind, points in compute.matmul.items()}
        ),
        attention_bytes_per_s=compute.attention_bytes_per_s,
        attention_flops_per_s=compute.attention_flops_per_s,
        step_s=compute.step_s,
        layer_s=compute.layer_s,
        sequence_s=compute.sequence_s,
        kv_head_s=compute.kv_head_s,
        element_s=compute.element_s,
        logit_s=compute.logit_s,
    )


def _without_noise(ranks: list[RankProfile]) -> list[RankProfile]:
    """Ranks of a kind that differ by noise alone become equal: their medians, and the least memory of them."""
    groups: list[list[RankProfile]] = []
    for profile in sorted(ranks, key=_speed, reverse=True):
        home = next((group for group in groups if _is_like(group[0], profile)), None)
        if home is None:
            groups.append([profile])
        else:
            home.append(profile)
    merged: dict[int, RankProfile] = {}
    for group in groups:
        common = _common(group)
        for profile in group:
            merged[profile.rank] = replace(common, rank=profile.rank, host=profile.host, node=profile.node)
    return [merged[profile.rank] for profile in ranks]


def _speed(profile: RankProfile) -> float:
    return statistics.geometric_mean([profile.memory_bytes_per_s, *(c[-1][1] for c in profile.matmul.rates.values())])


def _is_like(fastest: RankProfile, other: RankProfile) -> bool:
    # The fastest of a group is this much over its median when the slowest is as much under it.
    is_near = _speed(other) > (1 - _NOISE) / (1 + _NOISE) * _speed(fastest)
    same_memory = 0.75 < other.memory_bytes / fastest.memory_bytes < 1.34
    return is_near and same_memory and (other.threads, other.device) == (fastest.threads, fastest.device)


def _common(group: list[RankProfile]) -> RankProfile:
    def median(value: Callable[[RankProfile], float]) -> float:
        return _rounded(statistics.median(map(value, group)))

    first = group[0]
    curves = {
        kind: tuple(
            (width, _rounded(statistics.median(profile.matmul.rates[kind][index][1] for profile in group)))
            for index, (width, _) in enumerate(points)
        )
        for kind, points in first.matmul.rates.items()
    }
    return replace(
        first,
        memory_bytes=min(profile.memory_bytes for profile in group),
        memory_bytes_per_s=median(lambda profile: profile.memory_bytes_per_s),
        matmul=Matmul(curves),
        attention_bytes_per_s=median(lambda profile: profile.attention_bytes_per_s),
        attention_flops_per_s=median(lambda profile: profile.attention_flops_per_s),
        step_s=median(lambda profile: profile.step_s),
        layer_s=median(lambda profile: profile.layer_s),
        sequence_s=median(lambda profile: profile.sequence_s),
        kv_head_s=median(lambda profile: profile.kv_head_s),
        element_s=median(lambda profile: profile.element_s),
        logit_s=median(lambda profile: profile.logit_s),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS - 1}e}")


def _median_link(pairs: Sequence[PairTiming]) -> Link:
    if not pairs:
        return _NO_LINK
    latency_s = statistics.median(pair.latency_s for pair in pairs)
    return Link(_rounded(latency_s), _rounded(statistics.median(pair.bytes_per_s for pair in pairs)))


def _own_links(pairs: Sequence[PairTiming], nodes: Sequence[int], usual: Link) -> dict[tuple[int, int], Link]:
    found = {}
    for pair in pairs:
        ratios = (pair.latency_s / usual.latency_s, pair.bytes_per_s / usual.bytes_per_s)
        if any(not 1 / _OWN_LINK < ratio < _OWN_LINK for ratio in ratios):
            low, high = sorted((nodes[pair.first], nodes[pair.second]))
            found[low, high] = Link(_rounded(pair.latency_s), _rounded(pair.bytes_per_s))
    return found


def _reduce(curves: Sequence[ReduceCurve]) -> AllReduce | None:
    """The median over nodes of the most frequent size; None where no group has two ranks."""
    if not curves:
        return None
    num_ranks = statistics.mode(curve.num_ranks for curve in curves)
    alike = [dict(curve.seconds) for curve in curves if curve.num_ranks == num_ranks]
    sizes = sorted(alike[0])
    return AllReduce(num_ranks, tuple((size, _rounded(statistics.median(c[size] for c in alike))) for size in sizes))
