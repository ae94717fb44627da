"""All replicas together: their loads, and the sums over them that every decision asks for. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lepton_dist.coordinator.hunger import Hunger
from lepton_dist.coordinator.load import Doubt, Load
from lepton_dist.coordinator.prices import Demand, Prices, Steps


class Fleet:
    """What happens to one replica's load goes through here, so that the sums stay right.

    `work_s` are the reference seconds that all have to do, `speed` those that they do in a second, `fastest` is the
    number of the fastest. Arguments are those of `Balancer`.
    """

    def __init__(
        self, slots: Sequence[int], speeds: Sequence[float] | None, capacities: Sequence[float] | None, prices: Prices
    ) -> None:
        known: Sequence[float | None] = speeds or [None] * len(slots)
        self.doubt = Doubt()
        self.loads = [
            Load(n, n + max(2, n // 2), speed, self.doubt, capacity)
            for n, speed, capacity in zip(slots, known, capacities or [math.inf] * len(slots), strict=True)
        ]
        self.prices = prices
        self.work_s = 0.0
        self.speed = sum(load.speed.value for load in self.loads)
        self.fastest = self._find_fastest()
        self.hunger = Hunger(self.loads)

    def give(self, replica: int, key: str, demand: Demand) -> None:
        """A replica gets a request."""
        load = self.loads[replica]
        before_s = load.work_s
        load.give(key, demand, self.prices)
        self._moved(replica, before_s)

    def started(self, replica: int, key: str) -> None:
        """A replica has begun a request, if it still has it."""
        load = self.loads[replica]
        before_s = load.work_s
        load.started(key, self.prices)
        self._moved(replica, before_s)

    def take(self, replica: int, key: str) -> Demand:
        """A replica has a request no more.

        Raises:
            KeyError: it did not have it.
        """
        load = self.loads[replica]
        before_s = load.work_s
        demand = load.take(key, self.prices)
        self._moved(replica, before_s)
        return demand

    def measured(self, replica: int, steps: Steps) -> None:
        """A replica has run some steps."""
        load = self.loads[replica]
        before_s, speed_before = load.work_s, load.speed.value
        load.measured(steps, self.prices)
        speed = load.speed.value
        self.speed += speed - speed_before
        if speed > self.loads[self.fastest].speed.value:
            self.fastest = replica
        elif replica == self.fastest and speed < speed_before:
            self.fastest = self._find_fastest()
        self._moved(replica, before_s)

    def remaining_s(self, backlog_s: float) -> float:
        """Seconds until all loads and a backlog are done, if all replicas share them in proportion to their speed."""
        return max(self.work_s + backlog_s, 0.0) / self.speed

    def _find_fastest(self) -> int:
        return max(range(len(self.loads)), key=lambda index: self.loads[index].speed.value, default=0)

    def _moved(self, replica: int, before_s: float) -> None:
        self.work_s += self.loads[replica].work_s - before_s
        self.hunger.offer(replica)
