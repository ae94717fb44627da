"""Which request a hungry replica gets: the longest that it can end by the predicted end of all work. Pure.

Graham's longest-processing-time rule on uniform machines: long requests first, where they end in time; short ones are
left for last, to fill the gaps.
"""

from __future__ import annotations

from collections.abc import Callable

from lepton_dist.coordinator.backlog import Backlog
from lepton_dist.coordinator.end_game import water_level
from lepton_dist.coordinator.fleet import Fleet
from lepton_dist.coordinator.load import Load

_MARGIN = 0.9  # of the time left: what a request may take, as predictions err
_CAUTION = 0.125  # the same for a replica of unknown speed
_NEARLY = 0.9  # of the fastest replica's speed: who counts as one of the fastest
_MISSES = 4  # replicas for which nothing fits, until the others are left for the next time


class LongestFirst:
    """Decides over a fleet and a backlog; `give` carries a decision out, before the next one is made.

    `patience` is that of `Balancer`.
    """

    def __init__(self, fleet: Fleet, backlog: Backlog, give: Callable[[str, int], None], patience: int) -> None:
        self._fleet, self._backlog, self._give, self._patience = fleet, backlog, give, patience
        self._expects_more = False

    def assign(self, expects_more: bool) -> list[tuple[str, int]]:
        """Feed those with least to do first; hold back who would only be late with what is left."""
        self._expects_more = expects_more
        fleet, backlog = self._fleet, self._backlog
        given: list[tuple[str, int]] = []
        held: list[int] = []
        end_s, is_exact, num_misses = fleet.remaining_s(self.backlog_s), expects_more, 0
        while len(backlog) and (replica := fleet.hunger.take()) is not None:
            key = self._choose(replica, end_s)
            if key is None and not is_exact:
                end_s, is_exact = water_level(fleet.loads, end_s * fleet.speed, fleet.speed), True
                key = self._choose(replica, end_s)
            if key is not None:
                self._give(key, replica)
                given.append((key, replica))
                continue
            held.append(replica)
            num_misses += 1
            if fleet.loads[replica].num_requests and (fleet.loads[replica].seconds > end_s or num_misses == _MISSES):
                break  # those that come later have more to do still
        given += self._assign_last()
        for replica in held:
            # Who has nothing to do gets something, if only to be of some use.
            if fleet.loads[replica].num_requests == 0 and (key := backlog.shortest()) is not None:
                self._give(key, replica)
                given.append((key, replica))
            else:
                fleet.hunger.offer(replica)
        return given

    @property
    def backlog_s(self) -> float:
        """Reference seconds of the backlog."""
        prices, slots = self._fleet.prices, self._fleet.loads[0].slots
        return self._backlog.prompt_tokens * prices.prompt_s + self._backlog.output_tokens * prices.share(slots)

    def _assign_last(self) -> list[tuple[str, int]]:
        """Too few are left to fill anyone's time: each goes where it ends first, if it can start there."""
        given: list[tuple[str, int]] = []
        loads = self._fleet.loads
        if len(self._backlog) > len(loads) or not any(load.has_slot for load in loads):
            return given
        while len(self._backlog) and (key := self._backlog.longest()) is not None:
            work_s = self._work(key)
            ends = [(load.work_s + work_s) / load.speed.value for load in loads]
            replica = ends.index(min(ends))
            if not loads[replica].has_slot:
                break
            self._give(key, replica)
            given.append((key, replica))
        return given

    def _choose(self, replica: int, end_s: float) -> str | None:
        """The longest request that a replica can end in time, if there is one; the fastest may take the longest."""
        fleet, backlog = self._fleet, self._backlog
        if self._expects_more and backlog.longest_wait >= self._patience:
            return backlog.first
        load = fleet.loads[replica]
        speed = load.speed.value
        if not self._expects_more and load.seconds > end_s:
            return None  # nothing fits that is not done at once
        limit_s = _MARGIN * end_s / (1.0 + fleet.doubt.value)
        if not load.is_known:
            limit_s *= _CAUTION
        if load.is_known and speed >= _NEARLY * fleet.loads[fleet.fastest].speed.value:
            key = backlog.longest()
        else:
            # A deep request draws a token in each of the replica's steps, and those are long while others share them.
            wait_s = load.queued_s / speed if not load.has_slot else 0.0
            key = backlog.longest((limit_s - wait_s) * speed / self._full_step_s(load))
        if key is None and load.has_slot:
            room_s = min((limit_s - load.seconds) / fleet.prices.share(load.slots), limit_s / fleet.prices.share(1))
            key = backlog.longest(room_s * speed)
        if key is None:
            return backlog.shortest() if self._expects_more else None
        if self._fits(load, key, end_s):
            return key
        key = backlog.shortest()
        return key if key is not None and self._fits(load, key, end_s) else None

    def _fits(self, load: Load, key: str, end_s: float) -> bool:
        return self._expects_more or load.seconds + 0.5 * self._work(key) / load.speed.value <= end_s

    def _full_step_s(self, load: Load) -> float:
        """Reference seconds of a step with all slots full, and prompts among them in the proportion of the backlog."""
        prices = self._fleet.prices
        prompts = self._backlog.prompt_tokens / max(self._backlog.output_tokens, 1e-9)
        return prices.step_s + load.slots * (prices.sample_s + prompts * prices.prompt_s)

    def _work(self, key: str) -> float:
        return self._fleet.prices.work(self._backlog[key], self._fleet.loads[0].slots)
