"""What the job's machines can do at best, as `profile` measures it. Figures are put beside these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lepton_dist.bench.workload import Lengths
from lepton_dist.coordinator.cluster import Cluster, RankProfile
from lepton_dist.coordinator.stage_cost import WEIGHT_BYTES, ModelCost
from lepton_dist.plan.placement import Seat, seats
from lepton_dist.plan.plan import Plan, Replica, Stage
from lepton_dist.runtime.compute import KINDS, WIDTHS
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.profiling import make_cluster


def measure_limits(controller: Controller, threads: int = 0) -> Cluster:
    """Memory bandwidth, matmul rates and all-reduces of all ranks at work together. No session may be open.

    `threads` are those of each rank, 0 for the job's.

    Raises:
        RankLostError: a rank did not answer in time.
    """
    world = controller.world
    return make_cluster("bench", world.hosts, world.nodes, controller.examine(kinds=KINDS, threads=threads))


def limits_table(cluster: Cluster) -> str:
    """The limits for people, summed over the ranks."""
    memory = sum(rank.memory_bytes_per_s for rank in cluster.ranks)
    lines = [f"limits of {len(cluster.ranks)} rank(s) together", f"  memory read {memory / 1e9:.1f} GB/s"]
    lines.append(f"  {'matmul GFLOP/s':16}" + "".join(f"{f'{width} rows':>10}" for width in WIDTHS))
    for kind in KINDS:
        rates = (sum(rank.matmul.flops_per_s(kind, width) for rank in cluster.ranks) for width in WIDTHS)
        lines.append(f"  {kind:16}" + "".join(f"{rate / 1e9:10.0f}" for rate in rates))
    for where, reduce in (("inside a node", cluster.within_reduce), ("over the job", cluster.between_reduce)):
        if reduce is not None:
            points = ", ".join(f"{size >> 10} KiB {seconds * 1e6:.0f}" for size, seconds in reduce.seconds)
            lines.append(f"  all-reduce of {reduce.num_ranks} ranks {where}, us: {points}")
    return "\n".join(lines)


@dataclass(frozen=True)
class PlanLimits:
    """The limits of one plan: if nothing but weights, KV cache and matmuls took time, and all ranks always worked.

    Of a pipeline with one sequence, or one prompt, one stage works at a time. `threads` are those that the ranks work
    with, where these are others than they were measured with: a rank has the cores of those that the plan leaves out.
    """

    cluster: Cluster
    plan: Plan
    model: ModelCost
    threads: Mapping[int, int] = field(default_factory=dict)

    def prefill(self) -> float:
        """Tokens/s of one prompt; the end of the last layer and the head are for its last token alone."""
        return self._flops_per_s() / (self._turns * 2 * (self._layer_weights - self._last_weights))

    def decode(self, count: int, context: float) -> float:
        """Tokens/s of `count` sequences of `context` cached tokens."""
        layers, head, model = self._layer_weights, self._head_weights, self.model
        num_bytes = layers * WEIGHT_BYTES[model.dtypes.weights] + head * WEIGHT_BYTES[model.head_dtype]
        # A sequence is in one replica, and a batch of a pipeline in one stage: each of them reads its weights anew.
        reads = self._turns * num_bytes + count * context * model.kv_token_bytes(self._whole)
        rate = sum(rank.memory_bytes_per_s * self._more(rank) for rank in self._ranks())
        return count / max(reads / rate, 2 * (layers + head) * count / self._flops_per_s())

    def offline(self, lengths: Iterable[Lengths]) -> float:
        """Tokens/s of output, by the operations alone."""
        items = list(lengths)
        tokens, drawn = sum(item.prompt + item.output for item in items), sum(item.output for item in items)
        last = self._last_weights
        products = (self._layer_weights - last) * tokens + (last + self._head_weights) * drawn
        return drawn * self._flops_per_s() / (2 * products)

    @property
    def _turns(self) -> int:
        return len(self.plan.replicas) * max(len(replica.stages) for replica in self.plan.replicas)

    @cached_property
    def _whole(self) -> Seat:
        """Of a rank that held the whole model."""
        alone = Plan(replicas=(Replica((Stage((0,)),)),))
        return seats(alone.resolve(self.model.shape, 1), self.model.shape)[0]

    @property
    def _layer_weights(self) -> int:
        return len(self._whole.layers) * self.model.layer_weights(self._whole)

    @property
    def _last_weights(self) -> int:
        return self.model.last_weights(self._whole)

    @property
    def _head_weights(self) -> int:
        return self.model.vocab_weights(self._whole)

    def _ranks(self) -> list[RankProfile]:
        used = {rank for replica in self.plan.replicas for rank in replica.ranks}
        return [rank for rank in self.cluster.ranks if rank.rank in used]

    def _flops_per_s(self) -> float:
        kind = self.model.dtypes.weights
        return sum(
            max(rank.matmul.flops_per_s(kind, width) for width in WIDTHS) * self._more(rank) for rank in self._ranks()
        )

    def _more(self, rank: RankProfile) -> float:
        """How many times the cores it was measured with a rank works with."""
        return self.threads.get(rank.rank, rank.threads) / rank.threads
