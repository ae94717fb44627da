"""The two policies that others have, to compare with: requests in order of arrival, whatever they cost. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from lepton_dist.coordinator.load import Load


class RoundRobin:
    """Each replica in turn; nobody gets anything while the one whose turn it is has no credit."""

    def __init__(self, loads: Sequence[Load]) -> None:
        self._loads = loads
        self._turn = 0

    def take(self) -> int | None:
        """The replica that gets the next request."""
        replica = self._turn
        if not self._loads[replica].has_credit:
            return None
        self._turn = (replica + 1) % len(self._loads)
        return replica


class LeastOutstanding:
    """The replica with the fewest requests."""

    def __init__(self, loads: Sequence[Load]) -> None:
        self._loads = loads

    def take(self) -> int | None:
        """The replica that gets the next request; None while none has credit."""
        with_credit = [(load.num_requests, index) for index, load in enumerate(self._loads) if load.has_credit]
        return min(with_credit)[1] if with_credit else None
