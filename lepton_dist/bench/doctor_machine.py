"""`doctor` on the machines: software, launcher, nodes, cores, memory, shared memory. Facts in, checks out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lepton_dist.bench.doctor_check import Check, numbers, size
from lepton_dist.comm.launcher import Launcher
from lepton_dist.runtime.facts import RankFacts

LITTLE_MEMORY_BYTES = 1 << 30
_SHOWN = 8


@dataclass(frozen=True)
class Site:
    """Who runs where: host name and node index of each rank, the launcher, and the MPI library's version (or "")."""

    hosts: Sequence[str]
    nodes: Sequence[int]
    launcher: Launcher
    library: str = ""

    @property
    def ranks_of_nodes(self) -> dict[int, list[int]]:
        """The ranks of each node."""
        result: dict[int, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            result.setdefault(node, []).append(rank)
        return result

    def named(self, rank: int) -> str:
        """A rank as people know it."""
        return f"rank {rank} on {self.hosts[rank]}"


def check_machines(site: Site, facts: Sequence[RankFacts]) -> list[Check]:
    """Every check of this file, in the order in which they are shown."""
    return [
        check_software(site, facts),
        *([check_world(site)] if len(site.hosts) > 1 else []),
        check_nodes(site),
        check_cores(site, facts),
        check_memory(site, facts),
        check_shared_memory(site, facts),
    ]


def check_software(site: Site, facts: Sequence[RankFacts]) -> Check:
    """The versions that matter, and that they are the same on every rank."""
    first = facts[0].versions
    found = ", ".join(f"{name} {version}" for name, version in first.items())
    for other in facts:
        differing = [name for name in first if other.versions.get(name) != first[name]]
        if differing:
            name = differing[0]
            return Check(
                "software",
                "FAIL",
                f"{found}; but {site.named(other.rank)} has {name} {other.versions.get(name)}",
                "start every rank from one environment, on a file system that all nodes see",
            )
    return Check("software", "OK", found)


def library_name(version: str) -> str:
    """The name and number in what MPI_Get_library_version says, which may go on for lines."""
    first = version.splitlines()[0] if version else ""
    return " ".join(first.split(",")[0].split())


def check_world(site: Site) -> Check:
    """The MPI library and the launcher. That they do not match ends a job before it comes here."""
    launcher = site.launcher.describe().split(", as rank")[0]
    return Check("MPI", "OK", f"{library_name(site.library)}; started by {launcher}; both see {len(site.hosts)} ranks")


def check_nodes(site: Site) -> Check:
    """How the ranks lie on nodes, and whether one host looks like several nodes."""
    by_node = site.ranks_of_nodes
    shown = [f"{site.hosts[ranks[0]]}: rank {numbers(ranks)}" for ranks in list(by_node.values())[:_SHOWN]]
    more = f"; and {len(by_node) - _SHOWN} more" if len(by_node) > _SHOWN else ""
    found = f"{len(site.hosts)} rank(s) on {len(by_node)} node(s): {'; '.join(shown)}{more}"
    hosts = [site.hosts[ranks[0]] for ranks in by_node.values()]
    split = sorted({host for host in hosts if hosts.count(host) > 1})
    if split:
        return Check(
            "nodes",
            "WARN",
            f"{found}; {split[0]} counts as {hosts.count(split[0])} nodes, since its ranks share no memory",
            "expected where each rank has a container or namespace of its own; there, traffic inside the host goes "
            "over MPI. Elsewhere, see that the ranks share /dev/shm, or name `mesh` in a plan of your own",
        )
    counts = sorted({len(ranks) for ranks in by_node.values()})
    if len(counts) > 1:
        return Check(
            "nodes",
            "WARN",
            f"{found}; some nodes have {counts[0]} ranks and others {counts[-1]}",
            "as it should be for unequal nodes; else give every node the same number (--ntasks-per-node, -ppn)",
        )
    return Check("nodes", "OK", found)


def check_cores(site: Site, facts: Sequence[RankFacts]) -> Check:
    """Whether each rank has cores of its own, uses as many threads, and leaves none of the node's idle."""
    problems: list[tuple[str, str]] = []
    for ranks in site.ranks_of_nodes.values():
        problem = _core_problem(site, [facts[rank] for rank in ranks])
        if problem is not None:
            problems.append(problem)
    first = facts[0]
    found = f"rank 0 may use core(s) {numbers(first.cores)} of {first.online_cores}; {first.threads} thread(s) a rank"
    if len({fact.threads for fact in facts}) > 1:
        found += f" (up to {max(fact.threads for fact in facts)} on others)"
    if not problems:
        return Check("cores", "OK", found)
    also = f" (and {len(problems) - 1} more node(s))" if len(problems) > 1 else ""
    return Check("cores", "WARN", f"{found}; {problems[0][0]}{also}", problems[0][1])


def _core_problem(site: Site, facts: Sequence[RankFacts]) -> tuple[str, str] | None:
    """What is wrong with the cores of one node's ranks, and what to do."""
    host = site.hosts[facts[0].rank]
    union = {core for fact in facts for core in fact.cores}
    if len(facts) > len(union):
        return (
            f"{len(facts)} ranks on {host} share {len(union)} core(s)",
            "fine for a test. For speed start no more ranks than cores, or bind each rank to cores of its own",
        )
    threads = sum(fact.threads for fact in facts)
    if threads > len(union):
        return (
            f"the ranks on {host} ask for {threads} threads and have {len(union)} cores",
            "lower SLURM_CPUS_PER_TASK or OMP_NUM_THREADS, or unset both: a rank then takes its fair share",
        )
    if 2 * len(union) <= facts[0].online_cores:
        return (
            f"{host} has {facts[0].online_cores} cores, its {len(facts)} rank(s) may use {len(union)}",
            "right if you share the node. Else take more (--cpus-per-task), or keep the launcher from binding "
            "(launch/mpirun does; srun --cpu-bind=none; Open MPI: --bind-to none)",
        )
    return None


def check_memory(site: Site, facts: Sequence[RankFacts]) -> Check:
    """What each rank may use: the node's free memory, within the limits of cgroup and SLURM, by its ranks."""
    least = min(facts, key=lambda fact: fact.memory_bytes)
    most = max(fact.memory_bytes for fact in facts)
    found = f"{size(least.memory_bytes)} a rank, of {size(least.node_memory_bytes)} in the node"
    if most - least.memory_bytes > most // 10:
        found = f"from {size(least.memory_bytes)} ({site.named(least.rank)}) to {size(most)} a rank"
    if least.memory_bytes < LITTLE_MEMORY_BYTES:
        return Check("memory", "WARN", found, "ask for more (--mem or --mem-per-cpu), or start fewer ranks a node")
    return Check("memory", "OK", found)


def check_shared_memory(site: Site, facts: Sequence[RankFacts]) -> Check:
    """Whether the ranks of each node speak through shared memory."""
    least = min(facts, key=lambda fact: fact.shm_free_bytes)
    found = f"/dev/shm has {size(least.shm_free_bytes)} free of {size(least.shm_bytes)}"
    notices = [(fact.rank, notice) for fact in facts for group in fact.groups for notice in group.notices]
    if notices:
        return Check(
            "shared memory",
            "WARN",
            f"{found}; {site.named(notices[0][0])}: {notices[0][1]}",
            "the job runs over MPI alone, slower inside the node. Remove what others left in /dev/shm, or ask the "
            "staff for a larger one",
        )
    if len(site.hosts) == len(site.ranks_of_nodes):
        return Check("shared memory", "OK", f"{found}; not needed with one rank a node")
    return Check("shared memory", "OK", f"{found}; the ranks of a node share a window")
