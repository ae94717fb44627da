"""What one replica has been given, and how long that will take it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lepton_dist.coordinator.prices import Demand, Prices, Steps
from lepton_dist.coordinator.speed import Speed

_CAUTIOUS_CREDIT = 4  # requests that a replica of unknown speed may hold: what has started cannot be taken back
_RESUM_EVERY = 8  # reports


class Doubt:
    """How far predicted lengths are from true ones: the mean of abs(log(true / predicted)), learned."""

    _WEIGHT = 1 / 64

    def __init__(self) -> None:
        self.value = 0.0

    def learn(self, predicted: float, actual: float) -> None:
        """A request had another length than predicted, or the same."""
        error = abs(math.log(max(actual, 1.0) / max(predicted, 1.0)))
        self.value += self._WEIGHT * (min(error, 2.0) - self.value)


@dataclass(slots=True)
class _Running:
    demand: Demand
    since: float  # the replica's `drawn` when it started


class Load:
    """One replica's requests: those queued at its leader, and those running.

    `work_s` are the reference seconds of all that it still has to do, `seconds` those that it needs for it if its slots
    stay full. `num_requests` are given and not finished; with `has_credit` it may be given one, which starts at once
    with `has_slot`. While its speed is not known it has little credit.

    Args:
        slots: sequences that it runs at once.
        credit: requests that it may hold.
        capacity: tokens that its KV cache holds.
        speed: reference seconds that it is thought to do in a second, until it is measured.
        doubt: of the predicted lengths, shared by all replicas.
    """

    def __init__(self, slots: int, credit: int, speed: float | None, doubt: Doubt, capacity: float = math.inf) -> None:
        self.slots, self.speed, self.capacity = slots, Speed(speed or 1.0), capacity
        self._held_tokens = 0.0  # of its KV cache, as predicted
        self.is_known = speed is not None
        self.doubt = doubt
        self.queued: dict[str, Demand] = {}
        self.running: dict[str, _Running] = {}
        self.asked: set[str] = set()
        self.queued_s = self.running_s = self.work_s = self.seconds = 0.0
        self._credit = credit
        self._drawn = 0.0  # tokens drawn by each running sequence since the beginning, in the mean
        self._num_reports = self._num_running = 0  # sequences that run
        self._prices: Prices | None = None  # those of the last sum
        self._sum_up()

    def give(self, key: str, demand: Demand, prices: Prices) -> None:
        """It is given a request."""
        self.queued[key] = demand
        self._held_tokens += demand.prompt_tokens + demand.output_tokens
        self.queued_s += prices.work(demand, self.slots)
        self._sum_up()

    def started(self, key: str, prices: Prices) -> None:
        """It has begun a request; a prompt counts as done from then on. Nothing happens when it has it no more."""
        demand = self.queued.pop(key, None)
        if demand is None:
            return
        self.asked.discard(key)
        self._subtract_queued(prices.work(demand, self.slots))
        self.running[key] = _Running(demand, self._drawn)
        self._num_running += demand.num_samples
        self.running_s += demand.output_tokens * prices.share(self.slots)
        self._sum_up()

    def take(self, key: str, prices: Prices) -> Demand:
        """It has finished a request, or given it back.

        Raises:
            KeyError: it does not have it.
        """
        demand = self.queued.pop(key, None)
        if demand is not None:
            self.asked.discard(key)
            self._let_go(demand)
            self._subtract_queued(prices.work(demand, self.slots))
            self._sum_up()
            return demand
        running = self.running.pop(key)
        self._let_go(running.demand)
        self._num_running -= running.demand.num_samples
        left = self._left(running) * prices.share(self.slots)
        self.running_s = max(self.running_s - left, 0.0) if self.running else 0.0
        self._sum_up()
        return running.demand

    def measured(self, steps: Steps, prices: Prices) -> None:
        """It has run some steps."""
        self.speed.measured(prices.steps(steps), steps.busy_s, steps.num_steps)
        self.is_known = True
        if self._num_running:
            self._drawn += steps.samples / self._num_running
        self._num_reports += 1
        if self._num_reports % _RESUM_EVERY and prices is self._prices:
            self.running_s = max(self.running_s - steps.samples * prices.share(self.slots), 0.0)
            self._sum_up()
        else:
            self.reprice(prices)

    def reprice(self, prices: Prices) -> None:
        """Sum up anew what is left."""
        self._prices = prices
        share_s, prompt_s = prices.share(self.slots), prices.prompt_s
        self.queued_s = 0.0
        for demand in self.queued.values():
            self.queued_s += demand.prompt_tokens * prompt_s + demand.output_tokens * share_s
        self.running_s = sum(map(self._left, self.running.values())) * share_s
        self._sum_up()

    def _left(self, running: _Running) -> float:
        """Tokens that a running request has yet to draw.

        The longer one outlives its prediction, the longer it will go on, as lengths have heavy tails.
        """
        drawn = (self._drawn - running.since) * running.demand.num_samples
        return max(running.demand.output_tokens - drawn, self.doubt.value * drawn)

    def _sum_up(self) -> None:
        self.work_s = self.queued_s + self.running_s
        self.seconds = self.work_s / self.speed.value
        # Plain attributes: they are asked for far more often than they change.
        self.num_requests = count = len(self.queued) + len(self.running)
        self.has_credit = count < self._credit and (self.is_known or count < _CAUTIOUS_CREDIT)
        self.has_slot = self.has_credit and count < self.slots and self._held_tokens < self.capacity

    def _let_go(self, demand: Demand) -> None:
        held = self._held_tokens - demand.prompt_tokens - demand.output_tokens
        self._held_tokens = held if self.queued or self.running else 0.0

    def _subtract_queued(self, work_s: float) -> None:
        self.queued_s = max(self.queued_s - work_s, 0.0) if self.queued else 0.0
