"""Which replica gets which request, and when: by predicted completion, for replicas of unequal speed. Pure.

A request that has started cannot be moved, so what counts is what is started where, in the end game above all. The
longest requests go first (`longest_first.py`); without backlog, what is queued at a replica that will be late is taken
back for one that is free sooner (`end_game.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from lepton_dist.coordinator.backlog import Backlog
from lepton_dist.coordinator.confined import Confined
from lepton_dist.coordinator.end_game import better_places
from lepton_dist.coordinator.fleet import Fleet
from lepton_dist.coordinator.in_order import LeastOutstanding, RoundRobin
from lepton_dist.coordinator.longest_first import LongestFirst
from lepton_dist.coordinator.prices import Demand, Prices, Steps
from lepton_dist.plan.plan import BalancerPolicy


class Balancer:
    """State in, decision out. `assign` and `take_back` decide; the other methods say what has happened.

    Each replica has `slots[i]` sequences that run at once and credit for half as many requests more (two at least), so
    that it is fed ahead of need. ``least_outstanding`` and ``round_robin`` serve in order of arrival and take nothing
    back; they are there to compare.

    Args:
        slots: one number a replica.
        patience: while more requests are expected, so many that came later may go before one, so that none starves.
        speeds: reference seconds a second, of each replica, where they are known beforehand.
        capacities: tokens of each replica's KV cache. A request that not all can hold goes, before any other, to one
            that can.
        prices: the price list to begin with; see `set_prices`.
    """

    def __init__(
        self,
        slots: Sequence[int],
        *,
        policy: BalancerPolicy = "predicted",
        speeds: Sequence[float] | None = None,
        capacities: Sequence[int] | None = None,
        prices: Prices | None = None,
        patience: int = 4096,
    ) -> None:
        self._fleet = Fleet(slots, speeds, capacities, prices or Prices())
        self.backlog = Backlog()
        self._confined = Confined(self._fleet)
        self._policy = policy
        self._expects_more = False
        self._replica_of: dict[str, int] = {}
        self._planned: dict[str, int] = {}  # who is to get a request that was asked back
        self._returned: list[tuple[str, int]] = []
        loads = self._fleet.loads
        self._in_order = RoundRobin(loads) if policy == "round_robin" else LeastOutstanding(loads)
        self._longest_first = LongestFirst(self._fleet, self.backlog, self._give, patience)

    # What has happened

    def add(self, key: str, demand: Demand) -> None:
        """A request has come in.

        Raises:
            ValueError: the key is in use.
        """
        if key in self._replica_of or key in self.backlog or key in self._confined.demands:
            raise ValueError(f"request {key!r} is here already")
        self._wait(key, demand)

    def expect_more(self, is_so: bool) -> None:
        """Whether the backlog is not all there is; while that is so, nobody is held back."""
        self._expects_more = is_so

    def guess(self, key: str, demand: Demand) -> None:
        """Another prediction for a request of the backlog.

        Raises:
            KeyError: it is not there.
        """
        self.backlog.change(key, demand)

    def drop_backlog(self) -> list[str]:
        """What no replica has been sent is given up; returns the keys."""
        dropped = [*self.backlog.keys(), *self._confined.demands]
        self._confined.clear()
        for key, _ in self._returned:
            Balancer.finished(self, key)  # not a subclass's: its log has a line for all of this
            dropped.append(key)
        self._returned = []
        self.backlog.clear()
        return dropped

    def started(self, key: str) -> None:
        """A replica has begun a request. Late word of one that is finished or given back counts for nothing."""
        replica = self._replica_of.get(key)
        if replica is not None:
            self._fleet.started(replica, key)

    def finished(self, key: str, output_tokens: int | None = None) -> None:
        """A request is done, with so many tokens in all, or gone.

        Raises:
            KeyError: no replica has it.
        """
        replica = self._replica_of.pop(key)
        self._planned.pop(key, None)
        demand = self._fleet.take(replica, key)
        if output_tokens is not None:
            self._fleet.doubt.learn(demand.output_tokens, output_tokens)

    def measured(self, replica: int, steps: Steps) -> None:
        """A replica has run some steps."""
        self._fleet.measured(replica, steps)

    def set_prices(self, prices: Prices) -> None:
        """Another price list, in the same unit. Each load is summed up anew with its next report."""
        self._fleet.prices = prices

    def returned(self, replica: int, keys: Sequence[str]) -> None:
        """A replica has given back these of the requests that it was asked for; it has begun the others."""
        for key in keys:
            del self._replica_of[key]
            self._wait(key, self._fleet.take(replica, key))
        for key in list(self._fleet.loads[replica].asked):
            self._planned.pop(key, None)
            self._fleet.started(replica, key)
        for key in keys:
            taker = self._planned.pop(key, None)
            if taker is not None and self._fleet.loads[taker].has_slot:
                self._give(key, taker)
                self._returned.append((key, taker))

    # What is known

    @property
    def num_waiting(self) -> int:
        """Requests that no replica has yet."""
        return len(self.backlog) + len(self._confined.demands)

    @property
    def waiting_prompt_tokens(self) -> float:
        """Tokens of their prompts."""
        return self.backlog.prompt_tokens + self._confined.prompt_tokens

    @property
    def num_outstanding(self) -> int:
        """Requests that a replica has."""
        return len(self._replica_of)

    @property
    def expects_more(self) -> bool:
        """Whether the backlog is not all there is."""
        return self._expects_more

    @property
    def prices(self) -> Prices:
        """The price list."""
        return self._fleet.prices

    @property
    def speeds(self) -> list[float]:
        """Reference seconds a second, of each replica."""
        return [load.speed.value for load in self._fleet.loads]

    def speed(self, replica: int) -> float:
        """Reference seconds a second of one replica."""
        return self._fleet.loads[replica].speed.value

    @property
    def remaining_s(self) -> float:
        """Seconds until everything known is done, if all replicas share it in proportion to their speed."""
        return self._fleet.remaining_s(self._longest_first.backlog_s)

    # Decisions

    def assign(self) -> list[tuple[str, int]]:
        """Requests and the replicas that get them now."""
        given, self._returned = self._returned, []
        while (choice := self._confined.choose()) is not None:
            self._give(*choice)
            given.append(choice)
        if len(self.backlog):
            is_predicted = self._policy == "predicted"
            given += self._longest_first.assign(self._expects_more) if is_predicted else self._assign_in_order()
        return given

    def take_back(self) -> list[tuple[int, list[str]]]:
        """Replicas, and the queued requests to ask back from them; `returned` tells what became of it.

        Only in the end game: with backlog there is something else to give.
        """
        if self._policy != "predicted" or self._expects_more or self.num_waiting:
            return []
        moves: dict[int, list[str]] = {}
        for key, donor, taker in better_places(self._fleet.loads, self.prices):
            self._fleet.loads[donor].asked.add(key)
            self._planned[key] = taker
            moves.setdefault(donor, []).append(key)
        return sorted(moves.items())

    def _assign_in_order(self) -> list[tuple[str, int]]:
        given = []
        while (key := self.backlog.first) is not None:
            replica = self._in_order.take()
            if replica is None:
                break
            self._give(key, replica)
            given.append((key, replica))
        return given

    def _give(self, key: str, replica: int) -> None:
        demand = self._confined.take(key)
        self._fleet.give(replica, key, self.backlog.give(key) if demand is None else demand)
        self._replica_of[key] = replica

    def _wait(self, key: str, demand: Demand) -> None:
        if self._confined.concerns(demand):
            self._confined.add(key, demand)
        else:
            self.backlog.add(key, demand)
