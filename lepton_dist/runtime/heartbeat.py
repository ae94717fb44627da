"""The beat of this process: a sign of life that its watchdog sends to its guardian, if it has one."""

from __future__ import annotations

from functools import cache

from lepton_dist.runtime.guardian import Guardian


class Heartbeat:
    """Passes beats on to the guardian that was attached last; without one they go nowhere."""

    def __init__(self) -> None:
        self._guardian: Guardian | None = None

    def attach(self, guardian: Guardian | None) -> None:
        """From here on beats go there."""
        self._guardian = guardian

    def beat(self, silence_s: float) -> None:
        """This process runs; it may be silent for so many seconds from now. 0: for as long as it likes."""
        if self._guardian is not None:
            self._guardian.beat(silence_s)


@cache
def heartbeat() -> Heartbeat:
    """That of this process."""
    return Heartbeat()
