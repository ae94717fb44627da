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
    donors = [(-load.seconds, index) for index, load in enumerate(loads) if len(load.queued) > len(load.asked)]
    if not donors:
        return []
    takers = [(load.seconds, index) for index, load in enumerate(loads) if load.has_slot]
    heapq.heapify(donors)
    heapq.heapify(takers)
    slots = {index: loads[index].slots - loads[index].num_requests for _, index in takers}
    queues = {index: [key for key in loads[index].queued if key not in loads[index].asked] for _, index in donors}
    moves = []
    while donors and takers:
        late_s, donor = heapq.heappop(donors)
        free_s, taker = takers[0]
        queue, held, room = queues[donor], loads[donor].queued, loads[taker].capacity
        key = queue[-1]
        if held[key].most_tokens > room:
            key = next((other for other in reversed(queue) if held[other].most_tokens <= room), "")
            if not key:
                continue
        work_s = prices.work(loads[donor].queued[key], loads[donor].slots)
        end_s = free_s + work_s / loads[taker].speed.value
        if taker == donor or end_s * _GAIN >= -late_s:
            continue
        queue.remove(key)
        moves.append((key, donor, taker))
        slots[taker] -= 1
        if slots[taker]:
            heapq.heapreplace(takers, (end_s, taker))
        else:
            heapq.heappop(takers)
        if queues[donor]:
            heapq.heappush(donors, (late_s + work_s / loads[donor].speed.value, donor))
    return moves
