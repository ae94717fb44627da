"""`profile`: measure the cluster that this job runs on, write it down, and say for people what was measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lepton_dist.coordinator.cluster import Cluster, Link, RankProfile, SlowHost
from lepton_dist.coordinator.cluster_document import write_cluster
from lepton_dist.runtime.compute import KINDS
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.profiling import make_cluster
from lepton_dist.storage.outputs import check_writable


def profile_job(controller: Controller, name: str, output: Path) -> int:
    """Measure the ranks of this job and their links, write the cluster `name` to `output`, print a summary; returns 0.

    Raises:
        OutputError: the file cannot be written.
    """
    start_s = time.perf_counter()
    check_writable(output)
    facts = controller.examine(kinds=KINDS)
    world = controller.world
    cluster = make_cluster(name, world.hosts, world.nodes, facts)
    write_cluster(cluster, output)
    print(summary(cluster, cluster.slow_hosts()))
    print(f"{world.size} rank(s) measured in {time.perf_counter() - start_s:.1f} s: {output}")
    sys.stdout.flush()
    return 0


def summary(cluster: Cluster, slow: Sequence[SlowHost]) -> str:
    """The cluster for people: a line for each kind of rank, the links, and a warning for each slow host."""
    kinds: dict[tuple[object, ...], list[RankProfile]] = {}
    for profile in cluster.ranks:
        kinds.setdefault(profile.kind, []).append(profile)
    lines = []
    for members in kinds.values():
        one = members[0]
        rates = ", ".join(f"{kind} {curve[-1][1] / 1e9:.0f}" for kind, curve in one.matmul.rates.items())
        hosts = len({profile.node for profile in members})
        lines.append(
            f"{len(members)} rank(s) on {hosts} node(s): {one.threads} thread(s), {one.memory_bytes / 2**30:.1f} GiB, "
            f"memory {one.memory_bytes_per_s / 1e9:.1f} GB/s, matmul GFLOP/s: {rates}"
        )
    ranks_of_node = max(cluster.nodes.count(node) for node in set(cluster.nodes))
    if ranks_of_node > 1:
        lines.append(f"inside nodes: {_link_text(cluster.within_node)}")
    if len(set(cluster.nodes)) > 1:
        own = f"; {len(cluster.pairs)} pair(s) of nodes differ" if cluster.pairs else ""
        lines.append(f"between nodes: {_link_text(cluster.between_nodes)}{own}")
    for host in slow:
        share = 100 * (1 - host.rate / host.median)
        lines.append(
            f"warning: {host.host} is {share:.0f} % slower than its twins: {host.what} {host.rate:.3g}, "
            f"median {host.median:.3g}: leave it out (--exclude), or let the plan give it less"
        )
    return "\n".join(lines)


def _link_text(link: Link) -> str:
    return f"{link.latency_s * 1e6:.1f} us, {link.bytes_per_s / 1e9:.2f} GB/s"
