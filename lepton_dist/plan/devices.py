"""Which rank computes on which GPU, from the plan and from what each rank sees. Pure: no CUDA, no environment.

A GPU is known by its identity (two 64-bit words of its UUID), not by its number: CUDA_VISIBLE_DEVICES and SLURM's
binding give every rank numbers of its own, and two ranks may see one GPU under different numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lepton_dist.errors import ConfigError
from lepton_dist.plan.plan import DeviceKind, Plan

GpuId = tuple[int, int]
"""The UUID of a GPU, or of a MIG slice, as two signed 64-bit words."""


@dataclass(frozen=True)
class Sight:
    """What one rank sees: its GPUs in the order of their numbers, and whether NCCL can be loaded there."""

    gpus: tuple[GpuId, ...] = ()
    has_nccl: bool = False


@dataclass(frozen=True)
class Binding:
    """Where a rank computes. `gpu` is its number of the GPU, None on the CPU; `sharers` ranks compute on that GPU."""

    gpu: int | None = None
    identity: GpuId | None = None
    sharers: int = 1

    @property
    def is_gpu(self) -> bool:
        """Whether the rank computes on a GPU."""
        return self.gpu is not None


def bind(sights: Sequence[Sequence[GpuId]], ranks_per_gpu: int) -> list[int | None]:
    """The number of the GPU that each rank of one node takes, in the order of the ranks; None where none is left.

    GPUs fill up evenly: no second rank on one while a rank could have another. Among free ones the lowest number goes
    first, so ranks that all see the same n GPUs take 0, 1, ... n - 1 by local rank. A rank that is bound to certain
    GPUs gets one of them, even if others must move for it (augmenting paths).
    """
    taken: list[int | None] = [None] * len(sights)
    holders: dict[GpuId, list[int]] = {}

    def take(rank: int, number: int) -> bool:
        holders.setdefault(sights[rank][number], []).append(rank)
        taken[rank] = number
        return True

    def place(rank: int, capacity: int, tried: set[GpuId]) -> bool:
        for number, gpu in enumerate(sights[rank]):
            if len(holders.get(gpu, ())) < capacity:
                return take(rank, number)
        for number, gpu in enumerate(sights[rank]):
            if gpu in tried:
                continue
            tried.add(gpu)
            for other in list(holders[gpu]):
                if place(other, capacity, tried):
                    holders[gpu].remove(other)
                    return take(rank, number)
        return False

    for capacity in range(1, ranks_per_gpu + 1):
        for rank in range(len(sights)):
            if taken[rank] is None:
                place(rank, capacity, set())
    return taken


def place_ranks(plan: Plan, nodes: Sequence[int], sights: Sequence[Sight]) -> Mapping[int, Binding]:
    """Where each rank of a resolved plan computes; `nodes` and `sights` are by world rank.

    A stage of device `auto` computes on GPUs where its nodes have one for every rank of the plan that may take one, and
    NCCL where it needs it; else on CPUs.

    Raises:
        ConfigError: a stage of device `cuda` has a rank without a GPU, or its collectives need NCCL and lack it.
    """
    kinds = {
        rank: plan.device_of(stage) for replica in plan.replicas for stage in replica.stages for rank in stage.ranks
    }
    bindings = _bind_nodes(kinds, nodes, sights, plan.ranks_per_gpu)
    crowded = {nodes[rank] for rank, kind in kinds.items() if kind == "auto" and not bindings[rank].is_gpu}
    result: dict[int, Binding] = {}
    for r, replica in enumerate(plan.replicas):
        for s, stage in enumerate(replica.stages):
            key = f"replicas[{r}].stages[{s}]"
            kind = plan.device_of(stage)
            if kind == "cuda":
                _require(key, stage.ranks, bindings, nodes, sights, plan.ranks_per_gpu)
            is_auto_gpu = (
                kind == "auto"
                and not crowded & {nodes[rank] for rank in stage.ranks}
                and not _lacks_nccl(stage.ranks, bindings, sights)
            )
            for rank in stage.ranks:
                result[rank] = bindings[rank] if kind == "cuda" or is_auto_gpu else Binding()
    return _with_sharers(result)


def can_use_nccl(bindings: Sequence[Binding]) -> bool:
    """Whether these ranks, two or more, can form an NCCL communicator: a GPU each, and none twice."""
    identities = [binding.identity for binding in bindings if binding.is_gpu]
    return len(identities) == len(bindings) and len(set(identities)) == len(identities)


def _bind_nodes(
    kinds: Mapping[int, DeviceKind], nodes: Sequence[int], sights: Sequence[Sight], ranks_per_gpu: int
) -> dict[int, Binding]:
    """Bindings of all ranks as if every `auto` were `cuda`; the ranks that must have a GPU choose first."""
    bindings = dict.fromkeys(kinds, Binding())
    for node in sorted({nodes[rank] for rank in kinds}):
        wanting = sorted(
            (rank for rank, kind in kinds.items() if nodes[rank] == node and kind != "cpu"),
            key=lambda rank: (kinds[rank] == "auto", rank),
        )
        numbers = bind([sights[rank].gpus for rank in wanting], ranks_per_gpu)
        for rank, number in zip(wanting, numbers, strict=True):
            if number is not None:
                bindings[rank] = Binding(number, sights[rank].gpus[number])
    return bindings


def _with_sharers(bindings: Mapping[int, Binding]) -> dict[int, Binding]:
    identities = [binding.identity for binding in bindings.values() if binding.is_gpu]
    return {
        rank: Binding(binding.gpu, binding.identity, identities.count(binding.identity)) if binding.is_gpu else binding
        for rank, binding in bindings.items()
    }


def _lacks_nccl(ranks: Sequence[int], bindings: Mapping[int, Binding], sights: Sequence[Sight]) -> bool:
    needs = len(ranks) > 1 and can_use_nccl([bindings[rank] for rank in ranks])
    return needs and not all(sights[rank].has_nccl for rank in ranks)


def _require(
    key: str,
    ranks: Sequence[int],
    bindings: Mapping[int, Binding],
    nodes: Sequence[int],
    sights: Sequence[Sight],
    ranks_per_gpu: int,
) -> None:
    for rank in ranks:
        if bindings[rank].is_gpu:
            continue
        if not sights[rank].gpus:
            raise ConfigError(
                f"rank {rank} is to compute on a GPU, but sees none: check nvidia-smi, CUDA_VISIBLE_DEVICES, the GPUs "
                "that the job asked for (--gpus-per-node) and that torch is a CUDA build; or write `device: cpu`",
                key=f"{key}.device",
            )
        seen = {gpu for other, sight in enumerate(sights) if nodes[other] == nodes[rank] for gpu in sight.gpus}
        wanting = sum(nodes[other] == nodes[rank] for other in bindings)
        raise ConfigError(
            f"rank {rank} finds no GPU left: {wanting} rank(s) of its node share {len(seen)} GPU(s), at most "
            f"{ranks_per_gpu} on each; start as many ranks as GPUs, or write `ranks_per_gpu: "
            f"{-(-wanting // len(seen))}`",
            key=f"{key}.device",
        )
    if _lacks_nccl(ranks, bindings, sights):
        rank = next(rank for rank in ranks if not sights[rank].has_nccl)
        raise ConfigError(
            f"{len(ranks)} GPUs share the stage's layers, which needs NCCL through CuPy, and rank {rank} cannot load "
            "it: pip install 'lepton-dist[gpu]' (cupy-cuda13x, nvidia-nccl-cu13)",
            key=f"{key}.device",
        )
