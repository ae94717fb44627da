"""How long a wait may last, by phase: loading a model is not stepping it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT_SECONDS = 120.0


class Patience:
    """The deadline of waits. Each wait reads `seconds` and `phase` when it starts; phases nest."""

    def __init__(self, seconds: float = DEFAULT_SECONDS, phase: str = "starting") -> None:
        _check(seconds)
        self.seconds = seconds
        self.phase = phase

    @contextmanager
    def during(self, phase: str, seconds: float) -> Iterator[None]:
        """Within the block, waits belong to `phase` and may last `seconds`.

        Raises:
            ValueError: `seconds` is not positive.
        """
        _check(seconds)
        before = self.seconds, self.phase
        self.seconds, self.phase = seconds, phase
        try:
            yield
        finally:
            self.seconds, self.phase = before


def _check(seconds: float) -> None:
    if not seconds > 0:
        raise ValueError(f"a deadline must be more than 0 seconds, not {seconds}")
