"""`doctor` on the links: what was measured inside nodes and between them. Facts in, checks out."""

from __future__ import annotations

from collections.abc import Sequence

from lepton_dist.bench.doctor_check import Check
from lepton_dist.bench.doctor_machine import Site
from lepton_dist.runtime.facts import GroupFacts, PairTiming, RankFacts

# Beyond these a link is worth a look: ranks that take turns on cores, or MPI on a management network.
SLOW_INSIDE_S, SLOW_BETWEEN_S = 0.5e-3, 1e-3
SLOW_BETWEEN_BYTES_PER_S = 200e6
# A pair this much slower than the median one stands out.
_OUTLIER = 3.0


def check_links(site: Site, facts: Sequence[RankFacts]) -> list[Check]:
    """Collectives of a node and of the job, and the pairs inside nodes and between them; nothing for one rank."""
    groups = [group for fact in facts for group in fact.groups if len(group.ranks) > 1]
    pairs = [pair for fact in facts for pair in fact.pairs]
    inside = [pair for pair in pairs if site.nodes[pair.first] == site.nodes[pair.second]]
    between = [pair for pair in pairs if site.nodes[pair.first] != site.nodes[pair.second]]
    checks = [_check_inside(site, inside)] if inside else []
    checks += [_check_between(site, between)] if between else []
    slowest = _slowest_by_name(groups)
    return checks + [_check_collectives(site, group) for group in slowest]


def _check_inside(site: Site, pairs: Sequence[PairTiming]) -> Check:
    slow = max(pairs, key=lambda pair: pair.latency_s)
    found = _summary(site, pairs)
    if slow.latency_s > SLOW_INSIDE_S:
        advice = (
            "ranks that share cores wait for each other's time slices: see `cores`; or the node is busy with others"
        )
        return Check("inside nodes", "WARN", found, advice)
    return Check("inside nodes", "OK", found)


def _check_between(site: Site, pairs: Sequence[PairTiming]) -> Check:
    latencies = sorted(pair.latency_s for pair in pairs)
    slow, narrow = max(pairs, key=_latency), min(pairs, key=_rate)
    rates = sorted(pair.bytes_per_s for pair in pairs)
    found = _summary(site, pairs)
    if slow.latency_s > SLOW_BETWEEN_S or narrow.bytes_per_s < SLOW_BETWEEN_BYTES_PER_S:
        return Check(
            "between nodes",
            "WARN",
            found,
            "keep tensor parallelism inside nodes (pp between them is the default), and see that MPI uses the fast "
            "network (UCX_NET_DEVICES, FI_PROVIDER, OMPI_MCA_btl_tcp_if_include)",
        )
    middle = len(pairs) // 2
    if slow.latency_s > _OUTLIER * latencies[middle] or narrow.bytes_per_s * _OUTLIER < rates[middle]:
        return Check(
            "between nodes", "WARN", found, "one pair stands out: leave its node out (--exclude), tell the staff"
        )
    return Check("between nodes", "OK", found)


def _check_collectives(site: Site, group: GroupFacts) -> Check:
    where = "the job" if group.name == "job" else f"a node ({site.hosts[group.ranks[0]]})"
    head = f"{len(group.ranks)} ranks of {where} over {', '.join(group.transports)}; median times, in us:"
    return Check(f"collectives, {group.name}", "OK", "\n".join([head, *_grid(group)]))


def _grid(group: GroupFacts) -> list[str]:
    """A row for each operation and carrier, a column for each size; a star marks the fastest where several ran."""
    sizes = sorted({row.num_bytes for row in group.timings})
    cells = {(row.operation, row.transport, row.algorithm, row.num_bytes): row.seconds for row in group.timings}
    rivals: dict[tuple[str, int], list[float]] = {}
    for (operation, _, _, num_bytes), seconds in cells.items():
        rivals.setdefault((operation, num_bytes), []).append(seconds)
    best = {key: min(times) for key, times in rivals.items() if len(times) > 1}
    lines = [f"{'':30}" + "".join(f"{_short(num_bytes):>11}" for num_bytes in sizes)]
    for operation, transport, algorithm in dict.fromkeys(key[:3] for key in cells):
        carrier = f"{operation} {transport}" + ("" if algorithm == "direct" else f" {algorithm}")
        line = f"{carrier:30}"
        for num_bytes in sizes:
            took = cells.get((operation, transport, algorithm, num_bytes))
            is_best = took is not None and took == best.get((operation, num_bytes))
            cell = "-" if took is None else f"{took * 1e6:.0f}"
            line += f"{cell:>10}{'*' if is_best else ' '}"
        lines.append(line.rstrip())
    return lines


def _slowest_by_name(groups: Sequence[GroupFacts]) -> list[GroupFacts]:
    """Of all nodes the one whose collectives take longest, and the job's group."""
    chosen: dict[str, GroupFacts] = {}
    for group in groups:
        if group.timings and (group.name not in chosen or _total(group) > _total(chosen[group.name])):
            chosen[group.name] = group
    return list(chosen.values())


def _total(group: GroupFacts) -> float:
    return sum(row.seconds for row in group.timings)


def _summary(site: Site, pairs: Sequence[PairTiming]) -> str:
    slow, narrow = max(pairs, key=_latency), min(pairs, key=_rate)
    found = f"8 bytes in {slow.latency_s * 1e6:.1f} us, 4 MiB at {narrow.bytes_per_s / 1e9:.2f} GB/s"
    if len(pairs) == 1:
        return f"{found} ({_ends(site, slow)})"
    ends = dict.fromkeys((_ends(site, slow), _ends(site, narrow)))
    return f"{found} at worst, over {len(pairs)} pairs ({'; '.join(ends)})"


def _ends(site: Site, pair: PairTiming) -> str:
    return f"{site.named(pair.first)} and {site.named(pair.second)}"


def _latency(pair: PairTiming) -> float:
    return pair.latency_s


def _rate(pair: PairTiming) -> float:
    return pair.bytes_per_s


def _short(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"
