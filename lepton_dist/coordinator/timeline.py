"""Who was busy when, as a trace for Perfetto (https://ui.perfetto.dev) in Chrome's JSON format. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_MOST_SPANS = 2000  # a lane; above that, neighbours become one


@dataclass(slots=True)
class Busy:
    """Steps on end, or nearly: `busy_s` of the time from `start_s` to `end_s` was spent in them."""

    start_s: float
    end_s: float
    busy_s: float
    num_steps: int
    tokens: int


@dataclass
class Lane:
    """One stage of a replica over time, coarser as it grows longer."""

    spans: list[Busy] = field(default_factory=list)
    busy_s: float = 0.0
    _gap_s: float = 1e-9

    def add(self, start_s: float, end_s: float, tokens: int, num_steps: int) -> None:
        """Steps from `start_s`, which is not before the last end, to `end_s`."""
        self.busy_s += end_s - start_s
        last = self.spans[-1] if self.spans else None
        if last is not None and start_s - last.end_s <= self._gap_s and end_s - last.start_s <= self._longest_s:
            last.end_s = end_s
            last.busy_s += end_s - start_s
            last.num_steps += num_steps
            last.tokens += tokens
            return
        self.spans.append(Busy(start_s, end_s, end_s - start_s, num_steps, tokens))
        if len(self.spans) > _MOST_SPANS:
            self._coarsen()

    def shorten(self, end_s: float) -> None:
        """The last steps end sooner than it was thought."""
        last = self.spans[-1]
        self.busy_s -= last.end_s - end_s
        last.busy_s -= last.end_s - end_s
        last.end_s = end_s

    @property
    def _longest_s(self) -> float:
        """A span's length, at most: a hundredth of what has passed, so that the picture keeps its shape."""
        return 0.01 * self.spans[-1].end_s

    def _coarsen(self) -> None:
        merged = []
        for first, second in zip(self.spans[::2], self.spans[1::2], strict=False):
            steps, tokens = first.num_steps + second.num_steps, first.tokens + second.tokens
            merged.append(Busy(first.start_s, second.end_s, first.busy_s + second.busy_s, steps, tokens))
        self.spans = merged + ([self.spans[-1]] if len(self.spans) % 2 else [])


def chrome_trace(
    lanes: Mapping[tuple[int, int], Lane], ranks: Mapping[tuple[int, int], Sequence[int]]
) -> dict[str, Any]:
    """A trace of lanes by (replica, stage), each on its `ranks`; microseconds."""
    events: list[dict[str, Any]] = []
    for (replica, stage), lane in sorted(lanes.items()):
        where = {"pid": replica, "tid": stage}
        name = f"stage {stage} on ranks {', '.join(map(str, ranks[replica, stage]))}"
        if stage == 0:
            events.append({"ph": "M", "name": "process_name", "pid": replica, "args": {"name": f"replica {replica}"}})
        events.append({"ph": "M", "name": "thread_name", **where, "args": {"name": name}})
        for span in lane.spans:
            busy = span.busy_s / max(span.end_s - span.start_s, 1e-12)
            events.append(
                {
                    "ph": "X",
                    "name": "steps",
                    **where,
                    "ts": round(1e6 * span.start_s, 3),
                    "dur": round(1e6 * (span.end_s - span.start_s), 3),
                    "args": {"steps": span.num_steps, "tokens": span.tokens, "busy": round(busy, 4)},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
