"""The end of a batch: when all will be done, and which queued requests would end sooner elsewhere. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lepton_dist.coordinator.load import Load
from lepton_dist.coordinator.prices import Prices

_GAIN = 1.05  # how much later a replica must be, at least, than one that would get its request


def water_level(loads: Sequence[Load], work_s: float, speed: float) -> float:
    """Seconds until the end of all work, when no replica that is free sooner waits for one that is late.

    That is the t with sum(max(0, t - seconds) * speed) = backlog. `work_s` are the reference seconds of the loads and
    of the backlog, `speed` is the sum of all speeds.
    """
    level_s = work_s / speed
    late = [(load.seconds, load.speed.value) for load in loads if load.seconds > level_s]
    late.sort(reverse=True)
    for seconds, own_speed in late:
        if seconds <= work_s / speed or speed <= own_speed:
            break
        work_s, speed = work_s - seconds * own_speed, speed - own_speed
    return work_s / speed


def better_places(loads: Sequence[Load], prices: Prices) -> list[tuple[str, int, int]]:
    """Queued requests, the replicas that have them, and those where they would start at once and end well sooner.

    Again and again the last request of the replica that is done last goes to the one that is free first.
    """
    takers = [(load.seconds, index) for index, load in enumerate(loads) if load.has_slot]
    if not takers:
        return []
    # Nobody takes from one that is done sooner: most replicas are neither donors nor takers.
    late_s = min(takers)[0] * _GAIN
    donors = [
        (-load.seconds, index)
        for index, load in enumerate(loads)
        if load.seconds > late_s and len(load.queued) > len(load.asked)
    ]
    if not donors:
        return []
    heapq.heapify(donors)
    heapq.heapify(takers)
    queues: dict[int, list[str]] = {}
    slots: dict[int, int] = {}
    moves = []
    while donors and takers:
        late_s, donor = heapq.heappop(donors)
        free_s, taker = takers[0]
        if free_s * _GAIN >= -late_s:
            break  # nor would anyone gain who is done sooner
        load, to = loads[donor], loads[taker]
        queue = queues.get(donor)
        key = _last_queued(load) if queue is None else queue[-1]
        if load.queued[key].most_tokens > to.capacity:
            queue = queues[donor] = _queue(load) if queue is None else queue
            key = next((other for other in reversed(queue) if load.queued[other].most_tokens <= to.capacity), "")
            if not key:
                continue
        work_s = prices.work(load.queued[key], load.slots)
        end_s = free_s + work_s / to.speed.value
        if taker == donor or end_s * _GAIN >= -late_s:
            continue
        queue = queues[donor] = _queue(load) if queue is None else queue
        queue.remove(key)
        moves.append((key, donor, taker))
        slots[taker] = slots.get(taker, to.slots - to.num_requests) - 1
        if slots[taker]:
            heapq.heapreplace(takers, (end_s, taker))
        else:
            heapq.heappop(takers)
        if queue:
            heapq.heappush(donors, (late_s + work_s / load.speed.value, donor))
    return moves


def _queue(load: Load) -> list[str]:
    """What was queued and not asked back."""
    return [key for key in load.queued if key not in load.asked]


def _last_queued(load: Load) -> str:
    return next(key for key in reversed(load.queued) if key not in load.asked)
