"""The benchmark's cases, run through the controller like any other requests."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from lepton_dist.bench.decoding import DecodeSteps
from lepton_dist.bench.limits import PlanLimits
from lepton_dist.bench.memory import PeakMemory, rank_pids
from lepton_dist.bench.workload import DECODES, SAMPLED, Lengths, equal_lengths, make_requests, offline_lengths
from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.engine.request import Request
from lepton_dist.errors import LeptonError
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.opening import ModelRequest, open_model


@dataclass(frozen=True)
class Figure:
    """One case: the median of its repeats, their range, and the limit. Rates are tokens/s; `load` is in seconds.

    `peak_bytes` is the memory of the rank of rank 0's host that needed most meanwhile, without mapped file pages.
    """

    case: str
    value: float
    lowest: float
    highest: float
    unit: str
    limit: float | None = None
    peak_bytes: int | None = None

    @property
    def share(self) -> float | None:
        """The value as a part of the limit."""
        return None if self.limit is None else self.value / self.limit

    @property
    def is_beyond_limit(self) -> bool:
        """Whether it is more than can be, and so no figure to believe: the limits were measured in a busier moment."""
        return self.share is not None and self.share > 1.0

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "share": self.share}


class Measurement:
    """A model under one setting: loaded, warmed up, and put through the cases."""

    def __init__(self, controller: Controller, request: ModelRequest, plan: Plan, output_tokens: int) -> None:
        self._controller, self._output_tokens = controller, output_tokens
        self._memory = PeakMemory(rank_pids(controller.world.size))
        self._memory.reset()
        # Without prefix reuse: a repeat must not find the work of the one before.
        start = time.perf_counter()
        engine = replace(plan.engine, prefix_cache=False)
        self._blueprint: Blueprint = open_model(controller, replace(request, plan=replace(plan, engine=engine)))
        seconds = time.perf_counter() - start
        self.load = Figure("load", seconds, seconds, seconds, "s", peak_bytes=self._memory.bytes())
        self._num_runs = 0
        self._run(equal_lengths(2, 32, 4))

    def close(self) -> None:
        """End the session."""
        self._controller.close()

    def case(self, name: str, repeats: int, cluster: Cluster) -> Figure:
        """The figure of one case, and what the machines of `cluster` could reach at best."""
        self._memory.reset()
        values = [self._once(name) for _ in range(repeats)]
        limit = self._limit(name, cluster)
        middle = statistics.median(values)
        return Figure(name, middle, min(values), max(values), "tokens/s", limit, self._memory.bytes())

    def _once(self, name: str) -> float:
        if name == "prefill":
            return 512 / self._run(equal_lengths(1, 512, 1))
        if name == "offline":
            lengths = offline_lengths()
            return sum(item.output for item in lengths) / self._run(lengths)
        is_sampled = name == SAMPLED
        count, context = DECODES["decode b8" if is_sampled else name]
        # While the other prompts are computed the first sequences decode already: those steps are not counted.
        limits = self._blueprint.limits
        num_stages = max(len(replica.stages) for replica in self._blueprint.plan.replicas)
        prefill_steps = -(-count * context // limits.batch_tokens(num_stages))
        output = 1 + self._output_tokens + num_stages * prefill_steps
        steps = DecodeSteps()
        self._controller.listen(steps.heard)
        self._run(equal_lengths(count, context, output), is_sampled=is_sampled)
        self._controller.listen(None)
        rate = steps.tokens_per_s()
        if rate is None:
            raise LeptonError(f"{name}: too few of its steps only decode: raise --output-tokens")
        return rate

    def _run(self, lengths: list[Lengths], *, is_sampled: bool = False) -> float:
        """Seconds from the first request handed over to the last one finished."""
        self._num_runs += 1
        vocab = self._blueprint.config.shape.vocab
        requests = make_requests(lengths, vocab, seed=self._num_runs, is_sampled=is_sampled)
        for request in requests:
            self._controller.check(request)
        wanted = {request.key: request for request in requests}
        start = time.perf_counter()
        for request in requests:
            self._controller.submit(request)
        while self._controller.num_outstanding:
            for key, output in self._controller.advance():
                _check_length(wanted[key], len(output.completions[0].token_ids))
        return time.perf_counter() - start

    def _limit(self, name: str, cluster: Cluster) -> float | None:
        """None on GPUs, which `profile` does not measure."""
        if any(ready.device != "cpu" for ready in self._controller.ready.values()):
            return None
        config, plan = self._blueprint.config, self._blueprint.plan
        costs = ModelCost.of(config, decide_dtypes(plan.precision, None, config.dtype))
        threads = {rank: ready.threads for rank, ready in self._controller.ready.items()}
        limits = PlanLimits(cluster, plan, costs, threads)
        if name == "prefill":
            return limits.prefill()
        if name == "offline":
            return limits.offline(offline_lengths())
        count, context = DECODES["decode b8" if name == SAMPLED else name]
        return limits.decode(count, context + self._output_tokens / 2)


def _check_length(request: Request, length: int) -> None:
    if length != request.sampling.max_tokens:
        raise LeptonError(f"request {request.key} ended after {length} of {request.sampling.max_tokens} tokens")
