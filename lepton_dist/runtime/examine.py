"""The examination behind `doctor`: every rank looks at its machine, and all of them measure their links together."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata

import psutil
import torch

from lepton_dist.comm.calibrate import calibrate
from lepton_dist.comm.devices import has_gpus, nccl_problem, see_gpus
from lepton_dist.comm.group import Group
from lepton_dist.comm.world import World
from lepton_dist.config.machine import affinity_mask, asked_threads, available_bytes, fair_threads, useful_threads
from lepton_dist.errors import CheckpointError
from lepton_dist.runtime.compute import measure_compute, measure_reduce
from lepton_dist.runtime.facts import (
    CollectiveTiming,
    ComputeFacts,
    GpuFacts,
    GroupFacts,
    PairTiming,
    RankFacts,
    ReduceCurve,
)
from lepton_dist.storage.fingerprint import model_fingerprint

EXAMINE_TIMEOUT_S = 60.0
SMALL_BYTES, LARGE_BYTES = 8, 4 << 20
_SECONDS_A_SIZE = 0.1
_MOST_ROUNDS = 500
_PACKAGES = ("lepton-dist", "mpi4py", "numpy", "tokenizers")


def examine(world: World, model: str = "", *, kinds: Sequence[str] = (), threads: int = 0) -> RankFacts:
    """Look at this rank's machine and measure its links; collective over the world, under a second on sound links.

    The first rank of each node also looks for the directory `model`, when one is named. With `kinds` of weights every
    rank measures how fast it computes with them, which takes some ten seconds more for all of them; `threads` are as
    asked for this run, 0 for the job's.

    Raises:
        RankLostError: a rank did not come before the deadline.
    """
    with world.patience.during("examining", EXAMINE_TIMEOUT_S):
        everyone = world.group(range(world.size), "doctor")
        members = [rank for rank in range(world.size) if world.nodes[rank] == world.nodes[world.rank]]
        # On a single node that group is the whole job's.
        node = everyone if len(members) == world.size else world.group(members, "doctor-node")
        masks = node.all_gather(torch.tensor(affinity_mask())).tolist()
        groups = [_group_facts(node, "node")]
        if node is not everyone:
            # One node at a time would be fairer to a shared switch, but all at once is what a step does.
            everyone.barrier()
            groups.append(_group_facts(everyone, "job"))
        pairs = _inside_nodes(world, everyone) + _between_nodes(world, everyone)
        share = fair_threads(masks, node.rank)
        threads, _ = useful_threads(threads or asked_threads() or share, share)
        compute, reduces = _measured(world, node, everyone, threads, kinds) if kinds else (None, [])
    looks = model and node.rank == 0
    shm_bytes, shm_free_bytes = _shared_memory()
    return RankFacts(
        rank=world.rank,
        versions=_versions(),
        cores=sorted(os.sched_getaffinity(0)),
        online_cores=psutil.cpu_count() or 1,
        asked_threads=asked_threads() or 0,
        threads=threads,
        memory_bytes=available_bytes(len(members)),
        node_memory_bytes=psutil.virtual_memory().total,
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free_bytes,
        gpus=_gpus(),
        nccl_problem=nccl_problem() if has_gpus() else "",
        model=_look_for(model) if looks else "",
        groups=[facts for facts in groups if facts.ranks[0] == world.rank],
        pairs=pairs,
        reduces=reduces,
        compute=compute,
    )


def _measured(
    world: World, node: Group, everyone: Group, threads: int, kinds: Sequence[str]
) -> tuple[ComputeFacts, list[ReduceCurve]]:
    """How fast this rank computes, and its groups add: the latter from each group's first rank alone."""
    torch.set_num_threads(threads)  # as a session does
    compute = measure_compute(node, world.group([world.rank], "alone"), kinds)
    groups = {"node": node} if node is everyone else {"node": node, "job": everyone}
    curves = []
    for name, group in groups.items():
        everyone.barrier()
        if group.size > 1:
            curve = measure_reduce(group, name)
            curves += [curve] if group.rank == 0 else []
    return compute, curves


def _group_facts(group: Group, name: str) -> GroupFacts:
    timings = [
        CollectiveTiming(row.operation, row.num_bytes, row.choice.transport, row.choice.algorithm, row.seconds)
        for row in calibrate(group)
    ]
    choices = group.table.lines() if group.table is not None else []
    return GroupFacts(name, list(group.members), sorted(group.transports), timings, choices, list(group.notices))


def _inside_nodes(world: World, everyone: Group) -> list[PairTiming]:
    """The first two ranks of each node, all nodes at once."""
    first = world.nodes.index(world.nodes[world.rank])
    mates = [rank for rank in range(world.size) if world.nodes[rank] == world.nodes[world.rank]][:2]
    return _measure(everyone, first, mates[1]) if len(mates) == 2 and world.rank in mates else []


def _between_nodes(world: World, everyone: Group) -> list[PairTiming]:
    """The first ranks of neighbouring nodes: two rounds of pairs that share no node, however many nodes there are."""
    leaders = [world.nodes.index(node) for node in sorted(set(world.nodes))]
    pairs: list[PairTiming] = []
    for start in (0, 1):
        everyone.barrier()
        for first, second in zip(leaders[start::2], leaders[start + 1 :: 2], strict=False):
            if world.rank in (first, second):
                pairs += _measure(everyone, first, second)
    return pairs


def _measure(everyone: Group, first: int, second: int) -> list[PairTiming]:
    """Ping-pong between two world ranks; only `first` returns the result."""
    small = _half_round_trip(everyone, first, second, SMALL_BYTES)
    large = _half_round_trip(everyone, first, second, LARGE_BYTES)
    return [PairTiming(first, second, small, LARGE_BYTES / large)] if everyone.rank == first else []


def _half_round_trip(everyone: Group, first: int, second: int, num_bytes: int) -> float:
    """Mean seconds of a message one way; `first` times one round and says how many follow."""
    is_first = everyone.rank == first
    peer = second if is_first else first
    data = torch.zeros(num_bytes, dtype=torch.uint8)

    def round_trip(tensor: torch.Tensor) -> None:
        if is_first:
            everyone.isend(tensor, peer).wait()
            everyone.irecv(tensor, peer).wait()
        else:
            everyone.irecv(tensor, peer).wait()
            everyone.isend(tensor, peer).wait()

    round_trip(data)  # connects, and touches the memory
    start = time.perf_counter()
    round_trip(data)
    once = max(time.perf_counter() - start, 1e-7)
    rounds = torch.tensor([min(max(int(_SECONDS_A_SIZE / once), 1), _MOST_ROUNDS)])
    if is_first:
        everyone.isend(rounds, peer).wait()
    else:
        everyone.irecv(rounds, peer).wait()
    count = int(rounds[0])
    start = time.perf_counter()
    for _ in range(count):
        round_trip(data)
    return max(time.perf_counter() - start, 1e-9) / count / 2


def _gpus() -> list[GpuFacts]:
    """The GPUs that this rank sees. Their free memory is asked of each, which gives it a context for as long."""
    found = []
    for number, identity in enumerate(see_gpus().gpus):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found.append(GpuFacts(properties.name, identity, total, free))
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _shared_memory() -> tuple[int, int]:
    """Size and free bytes of /dev/shm; zeros where there is none."""
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return 0, 0
    return stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize


def _look_for(model: str) -> str:
    try:
        return model_fingerprint(model)
    except CheckpointError as error:
        return f"error: {error}"
