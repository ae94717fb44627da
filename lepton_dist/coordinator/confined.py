"""Requests that only some replicas can hold, as the KV caches of the others are too small. Pure."""

from __future__ import annotations

from lepton_dist.coordinator.fleet import Fleet
from lepton_dist.coordinator.prices import Demand


class Confined:
    """They have no choice, so they come before those that have.

    `demands` are in the order of arrival, with `prompt_tokens` in all.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._smallest = min((load.capacity for load in fleet.loads), default=0.0)
        self.demands: dict[str, Demand] = {}
        self.prompt_tokens = 0.0

    def add(self, key: str, demand: Demand) -> None:
        """Put a request in."""
        self.demands[key] = demand
        self.prompt_tokens += demand.prompt_tokens

    def take(self, key: str) -> Demand | None:
        """Take a request out for a replica; None when it is not one of these."""
        demand = self.demands.pop(key, None)
        if demand is not None:
            self.prompt_tokens -= demand.prompt_tokens
        return demand

    def clear(self) -> None:
        """Give all up."""
        self.demands.clear()
        self.prompt_tokens = 0.0

    def concerns(self, demand: Demand) -> bool:
        """Whether a request is one of these."""
        return demand.most_tokens > self._smallest

    def choose(self) -> tuple[str, int] | None:
        """The first request that a replica with credit can hold, and the one of those that would end it first."""
        if not self.demands:
            return None
        loads, prices = self._fleet.loads, self._fleet.prices
        open_to = [index for index, load in enumerate(loads) if load.has_credit and load.capacity > self._smallest]
        largest = max((loads[index].capacity for index in open_to), default=0.0)
        for key, demand in self.demands.items():
            if demand.most_tokens <= largest:
                able = [index for index in open_to if loads[index].capacity >= demand.most_tokens]
                ends = [
                    (loads[index].work_s + prices.work(demand, loads[index].slots)) / loads[index].speed.value
                    for index in able
                ]
                return key, able[ends.index(min(ends))]
        return None
