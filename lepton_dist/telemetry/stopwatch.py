"""Time for deadlines: only while this process runs. SLURM suspends jobs for minutes (preemption, gang scheduling)."""

from __future__ import annotations

import time

LONGEST_LOOK_S = 1.0
"""What passes between two looks counts at most so much, in seconds: whoever waits looks far more often."""


class Stopwatch:
    """Counts the seconds since it was made or restarted, those left out in which the process was stopped.

    It must be looked at while time passes: what lies between two looks counts `LONGEST_LOOK_S` at most.
    """

    def __init__(self) -> None:
        self._last_s = time.perf_counter()
        self._seconds = 0.0

    def look(self) -> float:
        """The seconds so far."""
        now_s = time.perf_counter()
        self._seconds += min(now_s - self._last_s, LONGEST_LOOK_S)
        self._last_s = now_s
        return self._seconds

    def restart(self) -> None:
        """Count from here."""
        self._last_s, self._seconds = time.perf_counter(), 0.0
