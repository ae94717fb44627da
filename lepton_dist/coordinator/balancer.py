"""Which replica gets the next request: the one with the least predicted load, while it has credit. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class _Load:
    credit: int
    tokens: dict[str, int] = field(default_factory=dict)
    total: int = 0


class Balancer:
    """Hands out requests by predicted tokens.

    Replica i has credit for `sequences[i]` sequences: enough to be fed ahead of need, few enough that the rest can
    still go elsewhere. With ``is_dynamic=False`` the replicas are served in turn instead.
    """

    def __init__(self, sequences: list[int], *, is_dynamic: bool = True) -> None:
        self._is_dynamic = is_dynamic
        self._next = 0
        self._loads = [_Load(credit) for credit in sequences]
        self._replica_of: dict[str, int] = {}

    @property
    def num_outstanding(self) -> int:
        """Requests assigned and not finished."""
        return len(self._replica_of)

    @property
    def has_credit(self) -> bool:
        """Whether any replica would take a request now."""
        return any(len(load.tokens) < load.credit for load in self._loads)

    def assign(self, key: str, tokens: int) -> int | None:
        """Give a request of `tokens` predicted tokens to a replica; None when no replica has credit."""
        open_loads = [(load.total, index) for index, load in enumerate(self._loads) if len(load.tokens) < load.credit]
        if not open_loads:
            return None
        chosen = min(open_loads)[1] if self._is_dynamic else self._in_turn()
        if chosen is None:
            return None
        self._loads[chosen].tokens[key] = tokens
        self._loads[chosen].total += tokens
        self._replica_of[key] = chosen
        return chosen

    def _in_turn(self) -> int | None:
        """The replica whose turn it is, or None while it has no credit."""
        chosen = self._next
        load = self._loads[chosen]
        if len(load.tokens) >= load.credit:
            return None
        self._next = (chosen + 1) % len(self._loads)
        return chosen

    def finished(self, key: str) -> None:
        """A request is done, or was given back."""
        load = self._loads[self._replica_of.pop(key)]
        load.total -= load.tokens.pop(key)
