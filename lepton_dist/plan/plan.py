"""The sharding plan: replicas of stages of ranks, with the precision and the engine's limits.

A plan as a person writes it may be short (``mesh: {dp, pp, tp}``) and know neither the model nor the world;
`Plan.resolve` expands it to the explicit form for one model on one world. Only resolved plans are obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lepton_dist.errors import ConfigError
from lepton_dist.plan.axes import ModelShape

Auto = Literal["auto"]
DeviceKind = Literal["cpu", "cuda", "auto"]
DEVICE_KINDS: tuple[DeviceKind, ...] = ("cpu", "cuda", "auto")
BalancerPolicy = Literal["predicted", "least_outstanding", "round_robin"]
BALANCER_POLICIES: tuple[BalancerPolicy, ...] = ("predicted", "least_outstanding", "round_robin")


@dataclass(frozen=True)
class Mesh:
    """The short form: a regular grid with tensor parallelism innermost."""

    dp: int = 1
    pp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """Ranks in the grid."""
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        return f"dp {self.dp} x pp {self.pp} x tp {self.tp} = {self.size}"


@dataclass(frozen=True)
class Stage:
    """Contiguous layers on the ranks of one tensor-parallel group. ``layers`` 0 means: not yet resolved.

    `device` None is the plan's.
    """

    ranks: tuple[int, ...]
    layers: int = 0
    shares: tuple[float, ...] = ()
    first_layer: int = 0
    device: DeviceKind | None = None

    @property
    def layer_range(self) -> range:
        """The layers held, by number."""
        return range(self.first_layer, self.first_layer + self.layers)


@dataclass(frozen=True)
class Replica:
    """A full copy of the model."""

    stages: tuple[Stage, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks of the replica, stage by stage."""
        return tuple(rank for stage in self.stages for rank in stage.ranks)

    @property
    def leader(self) -> int:
        """The first rank of the first stage: it schedules the replica's steps."""
        return self.stages[0].ranks[0]

    @property
    def num_layers(self) -> int:
        """Layers over all stages."""
        return sum(stage.layers for stage in self.stages)


@dataclass(frozen=True)
class Precision:
    """Names of dtypes; None follows the checkpoint (weights) or the weights (KV cache, wire).

    An `int8` wire carries activations with a scale for each token and group of channels.
    """

    weights: str | None = None
    kv_cache: str | None = None
    wire: str | None = None


_BATCH_TOKENS = 512  # of a step
_PIPELINE_TOKENS, _LEAST_TOKENS = 256, 64  # of all the batches in flight on CPUs, and of one of them


@dataclass(frozen=True)
class EngineLimits:
    """What one replica's engine may use. Times are seconds, sizes are bytes of one rank."""

    block_tokens: int = 16
    max_batch_tokens: int | Auto = "auto"
    max_sequences: int = 64
    kv_cache_bytes: int | Auto = "auto"
    context_tokens: int | Auto = "auto"
    prefix_cache: bool = True
    overlap: bool = True
    step_timeout_s: float = 300.0
    load_timeout_s: float = 1800.0
    balancer: BalancerPolicy = "predicted"

    def batch_tokens(self, num_stages: int = 1) -> int:
        """Tokens of one step of a replica of so many stages at most, of a resolved plan.

        A batch that holds a prompt holds up those behind it in a pipeline: `auto` is less there (docs/performance.md).
        """
        if self.max_batch_tokens != "auto":
            return self.max_batch_tokens
        return _BATCH_TOKENS if num_stages == 1 else max(_PIPELINE_TOKENS // num_stages, _LEAST_TOKENS)


@dataclass(frozen=True)
class Plan:
    """Who holds what, in which precision, with which limits.

    A plan without `mesh` and `replicas` only sets limits and precision. With `is_auto` the planner has yet to say who
    holds what. `cluster` is the path of a file of `lepton-dist profile`.
    `device` is that of the stages which name none; at most `ranks_per_gpu` ranks compute on one GPU.
    """

    mesh: Mesh | None = None
    replicas: tuple[Replica, ...] = ()
    precision: Precision = field(default_factory=Precision)
    engine: EngineLimits = field(default_factory=EngineLimits)
    estimate: Mapping[str, Any] = field(default_factory=dict)
    is_auto: bool = False
    cluster: str | None = None
    device: DeviceKind = "cpu"
    ranks_per_gpu: int = 1

    @staticmethod
    def from_mesh(*, dp: int = 1, pp: int = 1, tp: int = 1) -> Plan:
        """A regular grid of dp * pp * tp ranks."""
        return Plan(mesh=Mesh(dp, pp, tp))

    @staticmethod
    def default(nodes: Sequence[int]) -> Plan:
        """Tensor parallel over the ranks of a node, pipeline over nodes; `nodes` is the node index of each rank."""
        by_node: dict[int, list[int]] = {}
        for rank, node in enumerate(nodes):
            by_node.setdefault(node, []).append(rank)
        return Plan(replicas=(Replica(tuple(Stage(tuple(ranks)) for ranks in by_node.values())),))

    @property
    def has_layout(self) -> bool:
        """Whether it says who holds what, or leaves that to the planner; else `laid_out` does."""
        return self.is_auto or self.mesh is not None or bool(self.replicas)

    def laid_out(self, nodes: Sequence[int]) -> Plan:
        """This plan, with the layout of `default` where it has none of its own."""
        return self if self.has_layout else replace(self, replicas=Plan.default(nodes).replicas)

    @property
    def ranks(self) -> frozenset[int]:
        """Every rank that the plan uses; none for the short form."""
        return frozenset(rank for replica in self.replicas for rank in replica.ranks)

    def device_of(self, stage: Stage) -> DeviceKind:
        """Where a stage of this plan computes."""
        return stage.device or self.device

    @property
    def wants_gpus(self) -> bool:
        """Whether any stage is on GPUs, or may be; of a resolved plan."""
        return any(self.device_of(stage) != "cpu" for replica in self.replicas for stage in replica.stages)

    def resolve(self, shape: ModelShape, world_size: int) -> Plan:
        """Expand to the explicit form and check it against a model and a world.

        Raises:
            ConfigError: ranks absent from the world or used twice, a mesh of another size, layers that do not add up
                to the model's, more ranks in a stage than the model has heads, or an automatic plan.
        """
        if self.is_auto:
            raise ConfigError(
                "`auto` is for `generate`, whose input says what to plan for: write dp, pp and tp here, or take a plan "
                "of `lepton-dist plan`",
                key="mesh",
            )
        replicas = self.replicas if self.mesh is None else _grid(self.mesh, world_size)
        placed = tuple(_place_layers(index, replica, shape.num_layers) for index, replica in enumerate(replicas))
        _check_ranks(placed, world_size)
        _check_widths(placed, shape)
        resolved = replace(self, mesh=None, replicas=placed)
        if self.engine.max_batch_tokens == "auto" and resolved.wants_gpus:
            # A GPU's products want more rows than a pipeline of CPUs is given.
            return replace(resolved, engine=replace(self.engine, max_batch_tokens=_BATCH_TOKENS))
        return resolved


def _grid(mesh: Mesh, world_size: int) -> tuple[Replica, ...]:
    if mesh.size != world_size:
        raise ConfigError(
            f"{mesh} ranks, but the job has {world_size}: start {mesh.size} ranks, "
            f"or change the mesh to a product of {world_size}",
            key="mesh",
        )
    return tuple(
        Replica(
            tuple(
                Stage(tuple(range(first, first + mesh.tp)))
                for first in range(d * mesh.pp * mesh.tp, (d + 1) * mesh.pp * mesh.tp, mesh.tp)
            )
        )
        for d in range(mesh.dp)
    )


def _place_layers(index: int, replica: Replica, num_layers: int) -> Replica:
    """Fill in the layers that a replica leaves open (equal parts, the earlier stages taking the remainder)."""
    stages = replica.stages
    key = f"replicas[{index}].stages"
    if len(stages) > num_layers:
        raise ConfigError(
            f"{len(stages)} stages, but the model has {num_layers} layers: every stage needs one", key=key
        )
    if all(stage.layers == 0 for stage in stages):
        base, extra = divmod(num_layers, len(stages))
        counts = [base + (position < extra) for position in range(len(stages))]
    else:
        counts = [stage.layers for stage in stages]
        for position, count in enumerate(counts):
            if count == 0:
                raise ConfigError("give `layers` to every stage of a replica or to none", key=f"{key}[{position}]")
    if sum(counts) != num_layers:
        raise ConfigError(f"the stages hold {sum(counts)} layers, but the model has {num_layers}", key=key)
    placed, first = [], 0
    for stage, count in zip(stages, counts, strict=True):
        shares = stage.shares or (1.0,) * len(stage.ranks)
        placed.append(replace(stage, layers=count, shares=shares, first_layer=first))
        first += count
    return Replica(tuple(placed))


def _check_ranks(replicas: Sequence[Replica], world_size: int) -> None:
    seen: dict[int, str] = {}
    for r, replica in enumerate(replicas):
        for s, stage in enumerate(replica.stages):
            key = f"replicas[{r}].stages[{s}].ranks"
            for rank in stage.ranks:
                if not 0 <= rank < world_size:
                    raise ConfigError(
                        f"rank {rank} does not exist: the job has {world_size} ranks (0 to {world_size - 1})", key=key
                    )
                if rank in seen:
                    raise ConfigError(f"rank {rank} is already used in {seen[rank]}", key=key)
                seen[rank] = key


def _check_widths(replicas: Sequence[Replica], shape: ModelShape) -> None:
    for r, replica in enumerate(replicas):
        for s, stage in enumerate(replica.stages):
            for name, total in (
                ("heads", shape.num_heads),
                ("ffn channels", shape.ffn),
                ("vocabulary rows", shape.vocab),
            ):
                if len(stage.ranks) > total:
                    raise ConfigError(
                        f"{len(stage.ranks)} ranks in one stage, but the model has {total} {name}: "
                        "every rank needs one; use more stages or fewer ranks",
                        key=f"replicas[{r}].stages[{s}].ranks",
                    )
