"""What happens when, in a simulation: a queue in order of time, and of arrival where times are equal. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from lepton_dist.engine.request import Request
from lepton_dist.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request comes in. It ends after `output_tokens`, which only the simulation knows beforehand."""

    request: Request
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """A batch comes back to the leader of a replica, after `num_steps` steps alike; 1 but for jumps (`replica.py`)."""

    replica: int
    chunks: list[Chunk]
    num_steps: int
    step_s: float
    version: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message between rank 0 and a replica's leader arrives; `act` gets the time."""

    act: Callable[[float], None]


Event = Arrival | Result | Delivery


class EventQueue:
    """Events by time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Event]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_s(self) -> float | None:
        """When something happens next."""
        return self._heap[0][0] if self._heap else None

    def push(self, time_s: float, event: Event) -> None:
        """Something will happen."""
        heapq.heappush(self._heap, (time_s, self._count, event))
        self._count += 1

    def pop(self) -> tuple[float, Event]:
        """What happens next, and when."""
        time_s, _, event = heapq.heappop(self._heap)
        return time_s, event
