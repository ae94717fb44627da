"""Which replica gets which request, and when: by predicted completion, for replicas of unequal speed. Pure.

A request that has started cannot be moved, so what counts is what is started where, in the end game above all. The
longest requests go first, each only to a replica that can end it by the predicted end of all work; short ones are
left for last, to fill the gaps. Without backlog, what is queued at a replica that will be late is taken back
for one that is free sooner (Graham's longest-processing-time rule on uniform machines, with corrections).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lepton_dist.coordinator.backlog import Backlog
from lepton_dist.coordinator.end_game import better_places, water_level
from lepton_dist.coordinator.hunger import Hunger
from lepton_dist.coordinator.in_order import LeastOutstanding, RoundRobin
from lepton_dist.coordinator.load import Doubt, Load
from lepton_dist.coordinator.prices import Demand, Prices, Steps
from lepton_dist.plan.plan import BalancerPolicy

_MARGIN = 0.9  # of the time left: what a request may take, as predictions err
_CAUTION = 0.125  # the same for a replica of unknown speed
_NEARLY = 0.9  # of the fastest replica's speed: who counts as one of the fastest
_MISSES = 4  # replicas for which nothing fits, until the others are left for the next time


class Balancer:
    """State in, decision out. `assign` and `take_back` decide; the other methods say what has happened.

    Each replica has `slots[i]` sequences that run at once and credit for half as many requests more (two at least), so
    that it is fed ahead of need. ``least_outstanding`` and ``round_robin`` serve in order of arrival and take nothing
    back; they are there to compare.

    Args:
        slots: one number a replica.
        patience: while more requests are expected, so many that came later may go before one, so that none starves.
        speeds: reference seconds a second, of each replica, where they are known beforehand.
        prices: the price list to begin with; see `set_prices`.
    """

    def __init__(
        self,
        slots: Sequence[int],
        *,
        policy: BalancerPolicy = "predicted",
        speeds: Sequence[float] | None = None,
        prices: Prices | None = None,
        patience: int = 4096,
    ) -> None:
        known: Sequence[float | None] = speeds or [None] * len(slots)
        self._doubt = Doubt()
        self._loads = [Load(n, n + max(2, n // 2), speed, self._doubt) for n, speed in zip(slots, known, strict=True)]
        self._policy = policy
        self._patience = patience
        self._expects_more = False
        self.prices = prices or Prices()
        self.backlog = Backlog()
        self._replica_of: dict[str, int] = {}
        self._planned: dict[str, int] = {}  # who is to get a request that was asked back
        self._returned: list[tuple[str, int]] = []
        self._in_order = RoundRobin(self._loads) if policy == "round_robin" else LeastOutstanding(self._loads)
        self._num_assigned = 0
        self._since: dict[str, int] = {}  # `_num_assigned` when a request of the backlog came in
        self._work_s = 0.0  # of all loads
        self._speed = sum(load.speed.value for load in self._loads)
        self._fastest = max(range(len(self._loads)), key=lambda index: self._loads[index].speed.value, default=0)
        self._hunger = Hunger(self._loads)

    # What has happened

    def add(self, key: str, demand: Demand) -> None:
        """A request has come in.

        Raises:
            ValueError: the key is in use.
        """
        if key in self._replica_of or key in self.backlog:
            raise ValueError(f"request {key!r} is here already")
        self._enqueue(key, demand)

    def expect_more(self, is_so: bool) -> None:
        """Whether the backlog is not all there is; while that is so, nobody is held back."""
        self._expects_more = is_so

    def guess(self, key: str, demand: Demand) -> None:
        """Another prediction for a request of the backlog.

        Raises:
            KeyError: it is not there.
        """
        self.backlog.take(key)
        self.backlog.add(key, demand)

    def drop_backlog(self) -> list[str]:
        """What no replica has been sent is given up; returns the keys."""
        dropped = self.backlog.keys()
        for key, _ in self._returned:
            Balancer.finished(self, key)  # not a subclass's: its log has a line for all of this
            dropped.append(key)
        self._returned = []
        self.backlog = Backlog()
        self._since.clear()
        return dropped

    def started(self, key: str) -> None:
        """A replica has begun a request. Late word of one that is finished or given back counts for nothing."""
        replica = self._replica_of.get(key)
        if replica is not None:
            before = self._loads[replica].work_s
            self._loads[replica].started(key, self.prices)
            self._moved(replica, before)

    def finished(self, key: str, output_tokens: int | None = None) -> None:
        """A request is done, with so many tokens in all, or gone.

        Raises:
            KeyError: no replica has it.
        """
        replica = self._replica_of.pop(key)
        self._planned.pop(key, None)
        before = self._loads[replica].work_s
        demand = self._loads[replica].take(key, self.prices)
        if output_tokens is not None:
            self._doubt.learn(demand.output_tokens, output_tokens)
        self._moved(replica, before)

    def measured(self, replica: int, steps: Steps) -> None:
        """A replica has run some steps."""
        load = self._loads[replica]
        before, speed_before = load.work_s, load.speed.value
        load.measured(steps, self.prices)
        self._speed += load.speed.value - speed_before
        if load.speed.value > self._loads[self._fastest].speed.value:
            self._fastest = replica
        elif replica == self._fastest and load.speed.value < speed_before:
            self._fastest = max(range(len(self._loads)), key=lambda index: self._loads[index].speed.value)
        self._moved(replica, before)

    def set_prices(self, prices: Prices) -> None:
        """Another price list, in the same unit. Each load is summed up anew with its next report."""
        self.prices = prices

    def returned(self, replica: int, keys: Sequence[str]) -> None:
        """A replica has given back these of the requests that it was asked for; it has begun the others."""
        load = self._loads[replica]
        before = load.work_s
        for key in keys:
            del self._replica_of[key]
            self._enqueue(key, load.take(key, self.prices))
        for key in list(load.asked):
            self._planned.pop(key, None)
            load.started(key, self.prices)
        self._moved(replica, before)
        for key in keys:
            taker = self._planned.pop(key, None)
            if taker is not None and self._loads[taker].has_slot:
                self._give(key, taker)
                self._returned.append((key, taker))

    # What is known

    @property
    def num_outstanding(self) -> int:
        """Requests that a replica has."""
        return len(self._replica_of)

    @property
    def expects_more(self) -> bool:
        """Whether the backlog is not all there is."""
        return self._expects_more

    @property
    def speeds(self) -> list[float]:
        """Reference seconds a second, of each replica."""
        return [load.speed.value for load in self._loads]

    def speed(self, replica: int) -> float:
        """Reference seconds a second of one replica."""
        return self._loads[replica].speed.value

    @property
    def remaining_s(self) -> float:
        """Seconds until everything known is done, if all replicas share it in proportion to their speed."""
        return max(self._work_s + self._backlog_s(), 0.0) / self._speed

    # Decisions

    def assign(self) -> list[tuple[str, int]]:
        """Requests and the replicas that get them now."""
        given, self._returned = self._returned, []
        if len(self.backlog):
            given += self._assign_predicted() if self._policy == "predicted" else self._assign_in_order()
        return given

    def take_back(self) -> list[tuple[int, list[str]]]:
        """Replicas, and the queued requests to ask back from them; `returned` tells what became of it.

        Only in the end game: with backlog there is something else to give.
        """
        if self._policy != "predicted" or self._expects_more or len(self.backlog):
            return []
        moves: dict[int, list[str]] = {}
        for key, donor, taker in better_places(self._loads, self.prices):
            self._loads[donor].asked.add(key)
            self._planned[key] = taker
            moves.setdefault(donor, []).append(key)
        return sorted(moves.items())

    def _assign_in_order(self) -> list[tuple[str, int]]:
        given = []
        while (key := next(iter(self._since), None)) is not None:
            replica = self._in_order.take()
            if replica is None:
                break
            self._give(key, replica)
            given.append((key, replica))
        return given

    def _assign_predicted(self) -> list[tuple[str, int]]:
        """Feed those with least to do first; hold back who would only be late with what is left."""
        given: list[tuple[str, int]] = []
        held: list[int] = []
        end_s, is_exact, num_misses = self.remaining_s, self._expects_more, 0
        while len(self.backlog) and (replica := self._hunger.take()) is not None:
            key = self._choose(replica, end_s)
            if key is None and not is_exact:
                end_s, is_exact = water_level(self._loads, end_s * self._speed, self._speed), True
                key = self._choose(replica, end_s)
            if key is not None:
                self._give(key, replica)
                given.append((key, replica))
                continue
            held.append(replica)
            num_misses += 1
            if self._loads[replica].num_requests and (self._loads[replica].seconds > end_s or num_misses == _MISSES):
                break  # those that come later have more to do still
        given += self._assign_last()
        for replica in held:
            # Who has nothing to do gets something, if only to be of some use.
            if self._loads[replica].num_requests == 0 and (key := self.backlog.shortest()) is not None:
                self._give(key, replica)
                given.append((key, replica))
            else:
                self._hunger.offer(replica)
        return given

    def _assign_last(self) -> list[tuple[str, int]]:
        """Too few are left to fill anyone's time: each goes where it ends first, if it can start there."""
        given: list[tuple[str, int]] = []
        while 0 < len(self.backlog) <= len(self._loads) and (key := self.backlog.longest()) is not None:
            work_s = self._work(key)
            ends = [(load.work_s + work_s) / load.speed.value for load in self._loads]
            replica = ends.index(min(ends))
            if not self._loads[replica].has_slot:
                break
            self._give(key, replica)
            given.append((key, replica))
        return given

    def _choose(self, replica: int, end_s: float) -> str | None:
        """The longest request that a replica can end in time, if there is one; the fastest may take the longest."""
        if self._expects_more and self._num_assigned - next(iter(self._since.values())) >= self._patience:
            return next(iter(self._since))
        load, speed = self._loads[replica], self._loads[replica].speed.value
        limit_s = _MARGIN * end_s / (1.0 + self._doubt.value)
        if not load.is_known:
            limit_s *= _CAUTION
        # A deep request draws a token in each of the replica's steps, and those are long while others share them.
        wait_s = load.queued_s / speed if not load.has_slot else 0.0
        is_fastest = load.is_known and speed >= _NEARLY * self._loads[self._fastest].speed.value
        depth = math.inf if is_fastest else (limit_s - wait_s) * speed / self._full_step_s(load)
        key = self.backlog.longest(depth)
        if key is None and load.has_slot:
            share_s = self.prices.share(load.slots)
            room_s = min((limit_s - load.seconds) / share_s, limit_s / self.prices.share(1))
            key = self.backlog.longest(room_s * speed)
        if key is not None and not self._fits(load, key, end_s):
            key = self.backlog.shortest()
        if key is not None and self._fits(load, key, end_s):
            return key
        return self.backlog.shortest() if self._expects_more else None

    def _fits(self, load: Load, key: str, end_s: float) -> bool:
        return self._expects_more or load.seconds + 0.5 * self._work(key) / load.speed.value <= end_s

    def _full_step_s(self, load: Load) -> float:
        """Reference seconds of a step with all slots full, and prompts among them in the proportion of the backlog."""
        prompts = self.backlog.prompt_tokens / max(self.backlog.output_tokens, 1e-9)
        return self.prices.step_s + load.slots * (self.prices.sample_s + prompts * self.prices.prompt_s)

    def _work(self, key: str) -> float:
        return self.prices.work(self.backlog[key], self._loads[0].slots)

    def _backlog_s(self) -> float:
        return self.prices.work(Demand(self.backlog.prompt_tokens, self.backlog.output_tokens), self._loads[0].slots)

    # Bookkeeping

    def _enqueue(self, key: str, demand: Demand) -> None:
        self.backlog.add(key, demand)
        self._since[key] = self._num_assigned

    def _give(self, key: str, replica: int) -> None:
        load = self._loads[replica]
        before = load.work_s
        load.give(key, self.backlog.take(key), self.prices)
        del self._since[key]
        self._num_assigned += 1
        self._replica_of[key] = replica
        self._moved(replica, before)

    def _moved(self, replica: int, before_s: float) -> None:
        """A load has changed."""
        self._work_s += self._loads[replica].work_s - before_s
        self._hunger.offer(replica)
