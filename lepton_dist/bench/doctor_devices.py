"""`doctor` on GPUs: what each rank sees, and which one it would take. Facts in, checks out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lepton_dist.bench.doctor_check import Check, size
from lepton_dist.bench.doctor_machine import Site
from lepton_dist.plan.devices import Binding, Sight, bind, place_ranks
from lepton_dist.plan.plan import Plan
from lepton_dist.runtime.facts import RankFacts

_SHOWN = 8


def check_devices(site: Site, facts: Sequence[RankFacts]) -> Check:
    """Which GPU each rank takes, one rank to a GPU, if the plan lets it."""
    if not any(fact.gpus for fact in facts):
        return Check("devices", "OK", "CPUs; no rank sees a GPU")
    numbers = _bound(site, facts)
    shown = [
        f"{site.named(rank)}: GPU {number}, {_described(facts[rank], number)}" if number is not None else ""
        for rank, number in enumerate(numbers)
    ]
    lines = [line for line in shown if line]
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    found = "\n".join([f"{len(lines)} of {len(facts)} rank(s) have a GPU of their own", *lines[:_SHOWN], *more])
    problem = next((fact for fact in facts if fact.nccl_problem), None)
    if problem is not None:
        return Check(
            "devices",
            "WARN",
            f"{found}\n{site.named(problem.rank)} has no NCCL: {problem.nccl_problem}",
            "a GPU works alone, and GPUs in pipelines through host memory; for tensor parallelism over GPUs: "
            "pip install 'lepton-dist[gpu]'",
        )
    left = {fact.rank for fact in facts if fact.gpus and numbers[fact.rank] is None}
    if left:
        rank = min(left)
        return Check(
            "devices",
            "WARN",
            f"{found}\n{site.named(rank)} sees {len(facts[rank].gpus)} GPU(s), which other ranks take",
            "start as many ranks a node as GPUs, give the rest `device: cpu` in the plan, or share (ranks_per_gpu)",
        )
    return Check("devices", "OK", f"{found}\nplans use them where they say `device: cuda` or `auto`")


def bindings_of(plan: Plan, site: Site, facts: Sequence[RankFacts]) -> Mapping[int, Binding]:
    """Where each rank of a resolved plan would compute, by the rule by which a session opens.

    Raises:
        ConfigError: as `place_ranks`.
    """
    sights = [Sight(tuple(gpu.identity for gpu in fact.gpus), not fact.nccl_problem) for fact in facts]
    return place_ranks(plan, site.nodes, sights)


def _bound(site: Site, facts: Sequence[RankFacts]) -> list[int | None]:
    numbers: list[int | None] = [None] * len(facts)
    for ranks in site.ranks_of_nodes.values():
        bound = bind([[gpu.identity for gpu in facts[rank].gpus] for rank in ranks], 1)
        for rank, number in zip(ranks, bound, strict=True):
            numbers[rank] = number
    return numbers


def _described(fact: RankFacts, number: int) -> str:
    gpu = fact.gpus[number]
    words = "".join(f"{word % 2**64:016x}" for word in gpu.identity)
    return f"{gpu.name} ({words[:8]}), {size(gpu.free_bytes)} free of {size(gpu.memory_bytes)}"
