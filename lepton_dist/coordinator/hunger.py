"""Who is to be fed next: replicas with credit, in order of how soon they run out of work. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lepton_dist.coordinator.load import Load


class Hunger:
    """A heap in which a replica's newest entry counts; `offer` it whenever its load has changed.

    Most loads change several times between two decisions: they are put in their place when one is taken.
    """

    def __init__(self, loads: Sequence[Load]) -> None:
        self._loads = loads
        self._heap: list[tuple[float, int, int]] = []
        self._versions = [0] * len(loads)
        self._offered = set(range(len(loads)))

    def offer(self, replica: int) -> None:
        """Put a replica in its place, if it has credit; else take it out."""
        self._offered.add(replica)

    def take(self) -> int | None:
        """The replica that runs out of work first, which is out then until it is offered again; None without any."""
        for replica in self._offered:
            self._place(replica)
        self._offered.clear()
        while self._heap:
            _, replica, version = heapq.heappop(self._heap)
            if version == self._versions[replica]:
                return replica
        return None

    def _place(self, replica: int) -> None:
        self._versions[replica] += 1
        load = self._loads[replica]
        if load.has_credit:
            # Who has nothing comes before who is thought to be done.
            seconds = load.seconds if load.num_requests else -1.0
            heapq.heappush(self._heap, (seconds, replica, self._versions[replica]))
        if len(self._heap) > 8 * len(self._loads) + 64:
            self._heap = [entry for entry in self._heap if entry[2] == self._versions[entry[1]]]
            heapq.heapify(self._heap)
