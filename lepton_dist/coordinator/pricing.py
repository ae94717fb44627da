"""What a plan, or a single replica, does for a workload: memory first, then the cost model's price. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.cost_model import CostModel, ReplicaCost
from lepton_dist.coordinator.pipeline_price import pipeline_request_s
from lepton_dist.coordinator.simulator import Simulator
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import Workload
from lepton_dist.engine.work import StepWork
from lepton_dist.plan.plan import EngineLimits, Plan, Replica

# Part of a rank's memory that a plan leaves free: for activations, messages, and what else lives on the node.
MEMORY_MARGIN = 0.1
# The error bar: the bound that the cost model's predictions are held to. A profile knows no more of itself.
PRICE_ERROR = 0.2
# Workloads of fewer output tokens are simulated; longer ones keep every replica full nearly throughout.
SIMULATED_TOKENS = 50_000


@dataclass(frozen=True)
class Target:
    """What to plan for. `max_positions` is the model's context."""

    cluster: Cluster
    model: ModelCost
    max_positions: int
    workload: Workload
    limits: EngineLimits = field(default_factory=EngineLimits)

    def costs(self, replicas: tuple[Replica, ...]) -> CostModel:
        """The cost model of some replicas, which must be resolved."""
        model = self.model
        plan = Plan(replicas=replicas, engine=self.limits)
        return CostModel(self.cluster, plan, model.shape, model.dtypes, is_gated=model.is_gated, is_tied=model.is_tied)

    @property
    def most_blocks(self) -> int:
        """KV blocks that `max_sequences` sequences at the full context take, as `runtime.session` counts them."""
        asked = self.limits.context_tokens
        context = self.max_positions if asked == "auto" else min(asked, self.max_positions)
        return self.limits.max_sequences * -(-context // self.limits.block_tokens)

    @property
    def is_short(self) -> bool:
        """Whether the whole workload can be simulated for every good plan."""
        tokens = sum(request.output_tokens for request in self.workload.requests)
        return not self.workload.is_endless and tokens <= SIMULATED_TOKENS

    def usable_bytes(self, rank: int) -> int:
        """Of a rank's memory, what a plan may fill."""
        return int((1 - MEMORY_MARGIN) * self.cluster.ranks[rank].memory_bytes)

    def wanted_tokens(self, batch: int) -> int:
        """Tokens of KV cache for `batch` of the longest sequences, in whole blocks."""
        size = self.limits.block_tokens
        return batch * -(-self.workload.longest_tokens // size) * size


@dataclass(frozen=True)
class Fit:
    """How a plan uses memory: `engine.kv_cache_bytes`, the KV tokens of each replica, and the bytes of each rank."""

    kv_cache_bytes: int
    capacity_tokens: tuple[int, ...]
    rank_bytes: dict[int, int]


def fit_memory(target: Target, replicas: Sequence[Replica], costs: Sequence[ReplicaCost]) -> Fit | None:
    """The KV cache for the longest sequences, as many as run together, as far as memory goes; None if it holds no one.

    A plan has one `kv_cache_bytes` for all its ranks, so that the scarcest of them limits the others too; limits that
    say how much it is are obeyed.
    """
    size, wanted = target.limits.block_tokens, target.wanted_tokens(target.limits.max_sequences)
    free, asked = [], 0.0
    for replica, cost in zip(replicas, costs, strict=True):
        for stage, stage_cost in zip(replica.stages, cost.stages, strict=True):
            for rank, held, token in zip(stage.ranks, stage_cost.held_bytes, stage_cost.kv_token_bytes, strict=True):
                free.append(target.usable_bytes(rank) - held)
                asked = max(asked, token * wanted)
    given = target.limits.kv_cache_bytes
    budget = int(min(asked, *free)) if given == "auto" else given
    if budget < 1 or budget > min(free):
        return None
    capacities, rank_bytes = [], {}
    for replica, cost in zip(replicas, costs, strict=True):
        tokens = [max(1.0, token) for stage in cost.stages for token in stage.kv_token_bytes]
        blocks = min(target.most_blocks, *(int(budget // (token * size)) for token in tokens))
        if blocks * size < target.workload.longest_tokens:
            return None
        capacities.append(blocks * size)
        for stage, stage_cost in zip(replica.stages, cost.stages, strict=True):
            for rank, held, token in zip(stage.ranks, stage_cost.held_bytes, stage_cost.kv_token_bytes, strict=True):
                # Every rank of a replica has as many blocks as its scarcest.
                rank_bytes[rank] = int(held + blocks * size * token)
    return Fit(budget, tuple(capacities), rank_bytes)


def request_s(target: Target, replica: Replica, costs: CostModel, batch: int) -> float:
    """Seconds of a replica's time that a request takes in the mean, `batch` of them sharing its steps.

    `costs` are those of the resolved `replica` alone.
    """
    if len(replica.stages) > 1 and batch > 1:
        return pipeline_request_s(replica, target.limits, costs, target.workload, batch)
    return _summed_s(target, costs, batch)


def rough_request_s(target: Target, costs: CostModel, batch: int) -> float:
    """`request_s` without a simulation: for a pipeline the middle of one price too low and one too high."""
    num_stages = len(costs.replicas[0].stages)
    low_s = _summed_s(target, costs, batch)
    if num_stages == 1 or batch == 1:
        return low_s
    return math.sqrt(low_s * _rounds_s(target, costs.replicas[0], min(num_stages, batch), batch))


def _summed_s(target: Target, costs: CostModel, batch: int) -> float:
    """What requests cost where no step holds up another one."""
    lengths = [(request.prompt_tokens, request.output_tokens) for request in target.workload.typical]
    found = {length: costs.request_s(0, *length, batch) for length in dict.fromkeys(lengths)}
    return statistics.fmean(found[length] for length in lengths)


def _rounds_s(target: Target, cost: ReplicaCost, in_flight: int, batch: int) -> float:
    """What requests cost a pipeline where a batch that holds a prompt keeps all the others behind it waiting.

    So a round, in which every batch in flight passes once, is as slow in each of its batches as its slowest one; with
    less than one new prompt a round, some rounds have none.
    """
    workload = target.workload
    prompt, output = workload.prompt_tokens, workload.output_tokens
    width = -(-batch // in_flight)
    kv_tokens = round(width * (prompt + output / 2))
    light_s = cost.step_s(StepWork(width, width, width, kv_tokens), in_flight)
    room = max(1, target.limits.batch_tokens(len(cost.stages)) - width)
    chunks = math.ceil(prompt / room)
    new_chunks = batch / output * chunks  # a round
    size = prompt / chunks
    tokens = min(float(room), size * max(1.0, new_chunks / in_flight))
    pairs = tokens * (prompt + 1) / 2
    heavy = StepWork(width + round(tokens), width, width + 1, kv_tokens, round(pairs))
    slower_s = cost.step_s(heavy, in_flight) - light_s
    # What prompts there are beyond the room of every batch of a round takes rounds of its own.
    part = max(min(1.0, new_chunks), new_chunks * size / (tokens * in_flight))
    return output * in_flight * (light_s + part * slower_s) / batch


@dataclass(frozen=True)
class Priced:
    """A plan and what it does. `seconds` is of the whole workload, None for an endless one; `latency_s` of a request
    that is alone on the slowest replica."""

    plan: Plan
    fit: Fit
    tokens_per_s: float
    latency_s: float
    seconds: float | None
    is_simulated: bool = False

    @property
    def num_ranks(self) -> int:
        """Ranks that the plan uses."""
        return len(self.plan.ranks)


def simulated(target: Target, priced: Priced) -> Priced:
    """The same with what the simulator says of a short workload; else as it is."""
    if not target.is_short:
        return priced
    blocks = [tokens // target.limits.block_tokens for tokens in priced.fit.capacity_tokens]
    result = Simulator(priced.plan, target.costs(priced.plan.replicas), blocks).run(target.workload.requests)
    return replace(priced, tokens_per_s=result.tokens_per_s, seconds=result.makespan_s, is_simulated=True)
