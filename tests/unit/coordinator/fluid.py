"""Replicas as fluids: each shares its speed equally among the requests that run on it, and queues the others."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence

from lepton_dist.coordinator.balancer import Balancer
from lepton_dist.coordinator.prices import Demand, Prices, Steps

PRICES = Prices(step_s=0.0, prompt_s=0.0, sample_s=1.0)
"""One second a token on a replica of speed 1."""


class Fluid:
    """One replica. `virtual` is the work that each running request has got since the beginning."""

    def __init__(self, speed: float, slots: int) -> None:
        self.speed, self.slots = speed, slots
        self.virtual = self.now_s = self.done_s = 0.0
        self.running: list[tuple[float, str]] = []
        self.queued: list[str] = []
        self._work = self._busy_s = 0.0

    def advance(self, now_s: float) -> None:
        if self.running:
            elapsed_s = now_s - self.now_s
            self.virtual += elapsed_s * self.speed / len(self.running)
            self._work += elapsed_s * self.speed
            self._busy_s += elapsed_s
        self.now_s = now_s

    @property
    def next_s(self) -> float:
        """When the next request ends, if none is added."""
        if not self.running:
            return math.inf
        return self.now_s + max(self.running[0][0] - self.virtual, 0.0) * len(self.running) / self.speed

    def fill(self, lengths: dict[str, float]) -> list[str]:
        begun = []
        while self.queued and len(self.running) < self.slots:
            key = self.queued.pop(0)
            heapq.heappush(self.running, (self.virtual + lengths[key], key))
            begun.append(key)
        return begun

    def ended(self) -> list[str]:
        keys = []
        while self.running and self.running[0][0] <= self.virtual + 1e-9 * (1 + self.virtual):
            keys.append(heapq.heappop(self.running)[1])
            self.done_s = self.now_s
        return keys

    def report(self) -> Steps | None:
        if not self._busy_s:
            return None
        steps = Steps(max(1, round(self._work / self.slots)), 0.0, self._work, self._busy_s)
        self._work = self._busy_s = 0.0
        return steps


class FluidRun:
    """A batch from its first assignment to its end. Each replica reports `num_reports` times before the bound."""

    def __init__(
        self,
        balancer: Balancer,
        speeds: Sequence[float],
        slots: int,
        lengths: Sequence[float],
        predicted: Sequence[float] | None = None,
        num_reports: int = 300,
    ) -> None:
        self.balancer = balancer
        self.replicas = [Fluid(speed, slots) for speed in speeds]
        self.lengths = {str(number): length for number, length in enumerate(lengths)}
        self.bound_s = max(sum(lengths) / sum(speeds), max(lengths) / max(speeds))
        self.decision_s = 0.0  # of this thread, spent in the balancer
        self.num_taken_back = 0
        self._period_s = self.bound_s / num_reports
        for key, demand in zip(self.lengths, predicted or lengths, strict=True):
            balancer.add(key, Demand(0.0, demand))

    def to_end(self) -> float:
        """The makespan over the bound. Every request must have run once."""
        done: list[str] = []
        report_s = 0.0
        while True:
            self._decide()
            next_s, index = min((replica.next_s, index) for index, replica in enumerate(self.replicas))
            if next_s == math.inf:
                break
            if report_s <= next_s:
                self._report(report_s)
                report_s += self._period_s
                continue
            replica = self.replicas[index]
            replica.advance(next_s)
            ended = replica.ended()
            start_s = time.thread_time()
            for key in ended:
                self.balancer.finished(key, round(self.lengths[key]))
            for key in replica.fill(self.lengths):
                self.balancer.started(key)
            self.decision_s += time.thread_time() - start_s
            done += ended
        assert sorted(done) == sorted(self.lengths), "a request was lost, or ran twice"
        assert self.balancer.num_outstanding == len(self.balancer.backlog) == 0
        return max(replica.done_s for replica in self.replicas) / self.bound_s

    def _report(self, now_s: float) -> None:
        for index, replica in enumerate(self.replicas):
            replica.advance(now_s)
            steps = replica.report()
            if steps is not None:
                start_s = time.thread_time()
                self.balancer.measured(index, steps)
                self.decision_s += time.thread_time() - start_s

    def _decide(self) -> None:
        while True:
            start_s = time.thread_time()
            given, taken = self.balancer.assign(), self.balancer.take_back()
            self.decision_s += time.thread_time() - start_s
            now_s = max(replica.now_s for replica in self.replicas)
            for key, index in given:
                self.replicas[index].advance(now_s)
                self.replicas[index].queued.append(key)
            for index in {index for _, index in given}:
                for key in self.replicas[index].fill(self.lengths):
                    self.balancer.started(key)
            for index, keys in taken:
                held = [key for key in keys if key in self.replicas[index].queued]
                self.replicas[index].queued = [key for key in self.replicas[index].queued if key not in held]
                self.num_taken_back += len(held)
                self.balancer.returned(index, held)
            if not taken:
                return
