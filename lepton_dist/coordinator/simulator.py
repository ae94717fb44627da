"""A run without the machines: discrete events, the real scheduler and balancer, the cost model as the clock. Pure.

Left out: prefixes that prompts share. Replicas report their steps as
leaders do, so that the balancer learns prices and speeds here as it does in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.decisions import Write
from lepton_dist.coordinator.dispatcher import Dispatcher
from lepton_dist.coordinator.events import Arrival, Delivery, EventQueue, Result
from lepton_dist.coordinator.replica import SimulatedReplica
from lepton_dist.coordinator.reports import RanStep, StepReport, report_every_s
from lepton_dist.coordinator.timeline import Lane
from lepton_dist.coordinator.workload import RequestLengths
from lepton_dist.engine.request import Request
from lepton_dist.errors import ConfigError
from lepton_dist.plan.plan import Plan


@dataclass
class Simulated:
    """What became of a workload. Latencies are in the order of completion; lanes are by (replica, stage)."""

    makespan_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_preemptions: int = 0
    num_taken_back: int = 0
    latencies_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    lanes: dict[tuple[int, int], Lane] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated a second."""
        return self.output_tokens / self.makespan_s

    def idle(self, replica: int, stage: int) -> float:
        """The share of the makespan in which a stage had nothing to compute."""
        return 1.0 - self.lanes[replica, stage].busy_s / self.makespan_s


class Simulator:
    """One workload on one resolved plan.

    Args:
        costs: the clock.
        num_blocks: KV blocks of each replica (`kv_blocks`).
        jumps: whether steps alike are taken at once; the results are the same but for the middle of attention's growth.
        write: takes the lines of the balancer's log.
    """

    def __init__(
        self,
        plan: Plan,
        costs: CostModel,
        num_blocks: Sequence[int],
        *,
        jumps: bool = True,
        write: Write | None = None,
    ) -> None:
        limits = plan.engine
        self._capacity = min(num_blocks) * limits.block_tokens
        self._replicas = [
            SimulatedReplica(index, cost, limits, blocks, jumps=jumps)
            for index, (cost, blocks) in enumerate(zip(costs.replicas, num_blocks, strict=True))
        ]
        slots = [limits.max_sequences] * len(self._replicas)
        self._dispatcher = Dispatcher(slots, limits.balancer, write=write)
        self._queue = EventQueue()
        self._report_every_s = report_every_s(len(self._replicas))  # as leaders do
        self._reported_s = [-self._report_every_s] * len(self._replicas)
        self._arrived: dict[str, tuple[float, int]] = {}
        self._num_to_come = 0
        self._result = Simulated()

    def run(self, workload: Sequence[RequestLengths]) -> Simulated:
        """Simulate to the end.

        Raises:
            ConfigError: a request does not fit the KV cache.
        """
        self._enter(workload)
        now_s = 0.0
        while len(self._queue):
            now_s, event = self._queue.pop()
            if isinstance(event, Arrival):
                self._arrive(now_s, event)
            elif isinstance(event, Delivery):
                event.act(now_s)
            elif self._replicas[event.replica].is_current(event):
                self._come_back(now_s, event)
        result = self._result
        result.makespan_s = now_s
        result.num_preemptions = sum(replica.scheduler.num_preemptions for replica in self._replicas)
        for replica in self._replicas:
            result.lanes.update({(replica.index, stage): lane for stage, lane in enumerate(replica.lanes)})
        return result

    def _enter(self, workload: Sequence[RequestLengths]) -> None:
        self._num_to_come = len(workload)
        for number, item in enumerate(workload):
            if item.prompt_tokens + item.max_tokens > self._capacity:
                raise ConfigError(
                    f"request {number + 1} needs {item.prompt_tokens + item.max_tokens} tokens of KV cache, a replica "
                    f"has {self._capacity}: raise engine.kv_cache_bytes, or use more ranks a replica"
                )
            known = item.max_tokens == item.output_tokens
            sampling = SamplingParams(max_tokens=item.max_tokens, ignore_eos=known, seed=0)
            request = Request(str(number), [0] * item.prompt_tokens, sampling)
            self._result.prompt_tokens += item.prompt_tokens
            self._result.output_tokens += item.output_tokens
            self._queue.push(item.arrival_s, Arrival(request, item.output_tokens))

    def _arrive(self, now_s: float, event: Arrival) -> None:
        self._num_to_come -= 1
        self._arrived[event.request.key] = now_s, event.output_tokens
        self._dispatcher.submit(event.request)
        self._dispatcher.expect_more(self._num_to_come > 0)
        # All that come at once are seen together, as a run reads its input ahead.
        if self._queue.next_s != now_s:
            self._decide(now_s)

    def _come_back(self, now_s: float, event: Result) -> None:
        replica = self._replicas[event.replica]
        finished: list[str] = []
        for sequence, is_end in replica.take(now_s, event):
            key = sequence.request.key
            if is_end:
                finished.append(key)
            else:
                self._result.first_token_s.append(now_s - self._arrived[key][0])
        reports = now_s - self._reported_s[event.replica] >= self._report_every_s
        if reports or finished:
            begun: list[str] = []
            steps: list[RanStep] = []
            if reports:
                self._reported_s[event.replica] = now_s
                (begun, steps), (replica.begun, replica.steps) = (replica.begun, replica.steps), ([], [])
            self._send(now_s, replica, partial(self._hear, replica, finished, begun, steps))
        self._start(now_s, replica)

    def _hear(
        self, replica: SimulatedReplica, finished: list[str], begun: list[str], steps: list[RanStep], now_s: float
    ) -> None:
        """Rank 0 learns what a replica has done."""
        for key in finished:
            arrival_s, tokens = self._arrived.pop(key)
            self._result.latencies_s.append(now_s - arrival_s)
            self._dispatcher.finished(key, tokens)
        self._dispatcher.ran(replica.index, begun, StepReport.of(steps))
        self._decide(now_s)

    def _send(self, now_s: float, replica: SimulatedReplica, act: Callable[[float], None]) -> None:
        """A message between rank 0 and a leader; rank 0 reaches itself at once."""
        if replica.reach_s:
            self._queue.push(now_s + replica.reach_s, Delivery(act))
        else:
            act(now_s)

    def _decide(self, now_s: float) -> None:
        given, taken = self._dispatcher.decide()
        for index, requests in given.items():
            replica = self._replicas[index]
            self._send(now_s, replica, partial(self._get, replica, requests))
        for index, keys in taken:
            replica = self._replicas[index]
            self._send(now_s, replica, partial(self._give_back, replica, keys))

    def _get(self, replica: SimulatedReplica, requests: list[Request], now_s: float) -> None:
        """A replica gets requests."""
        for request in requests:
            replica.add(request, self._arrived[request.key][1])
        cut = replica.cut(now_s)
        if cut is not None:
            self._queue.push(*cut)
        self._start(now_s, replica)

    def _give_back(self, replica: SimulatedReplica, keys: list[str], now_s: float) -> None:
        """A replica is asked for requests; its answer goes back."""
        dropped = replica.give_back(keys)
        self._result.num_taken_back += len(dropped)
        self._send(now_s, replica, partial(self._get_back, replica, dropped))

    def _get_back(self, replica: SimulatedReplica, keys: list[str], now_s: float) -> None:
        self._dispatcher.dropped(replica.index, keys)
        self._decide(now_s)

    def _start(self, now_s: float, replica: SimulatedReplica) -> None:
        while (started := replica.start(now_s)) is not None:
            self._queue.push(*started)


def kv_blocks(plan: Plan, costs: CostModel, cluster: Cluster, most_blocks: int) -> list[int]:
    """KV blocks of each replica: as the plan says, or at most `most_blocks` in half of its scarcest rank's memory.

    Raises:
        ConfigError: weights and KV cache do not fit a rank, or leave no room for one block.
    """
    found = []
    for index, (replica, cost) in enumerate(zip(plan.replicas, costs.replicas, strict=True)):
        fewest = most_blocks
        for number, (stage, stage_cost) in enumerate(zip(replica.stages, cost.stages, strict=True)):
            for rank, held, token in zip(stage.ranks, stage_cost.held_bytes, stage_cost.kv_token_bytes, strict=True):
                memory = cluster.ranks[rank].memory_bytes
                asked = plan.engine.kv_cache_bytes
                block = token * plan.engine.block_tokens
                blocks = min(int((memory // 2 if asked == "auto" else asked) // block), most_blocks)
                if blocks < 1 or held + blocks * block > memory:
                    raise ConfigError(
                        f"rank {rank} needs {held:.0f} bytes for weights and {max(blocks, 1) * block:.0f} for the KV "
                        f"cache, but has {memory}: use more ranks, or a smaller engine.kv_cache_bytes",
                        key=f"replicas[{index}].stages[{number}]",
                    )
                fewest = min(fewest, blocks)
        found.append(fewest)
    return found
