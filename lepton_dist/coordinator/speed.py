"""How fast a replica is now: reference seconds of work done in a busy second. Pure."""

from __future__ import annotations

import math

_HALF_LIFE = 64.0  # steps
_FAST_HALF_LIFE = 3.0
_CHANGE = math.log(1.25)
_NUM_STEADY = 4


class Speed:
    """A slow mean, steady enough to plan with, that jumps to a fast one when the two disagree for several steps.

    So noise averages out, and a replica that slows down (a neighbour on its cores, a thermal limit) is known within a
    few steps.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self.value = speed
        self.is_measured = False
        self._work_s = self._busy_s = 0.0
        self._fast_work_s = self._fast_busy_s = 0.0
        self._num_apart = 0.0

    def measured(self, work_s: float, busy_s: float, num_steps: int = 1) -> None:
        """Steps took `busy_s` where a replica of speed 1 would have needed `work_s`."""
        if busy_s <= 0 or work_s <= 0 or num_steps < 1:
            return
        keep, keep_fast = 0.5 ** (num_steps / _HALF_LIFE), 0.5 ** (num_steps / _FAST_HALF_LIFE)
        self._work_s, self._busy_s = self._work_s * keep + work_s, self._busy_s * keep + busy_s
        self._fast_work_s = self._fast_work_s * keep_fast + work_s
        self._fast_busy_s = self._fast_busy_s * keep_fast + busy_s
        apart = abs(math.log(self._fast_work_s / self._fast_busy_s * self._busy_s / self._work_s)) > _CHANGE
        self._num_apart = self._num_apart + num_steps if apart else 0.0
        if self._num_apart >= _NUM_STEADY:
            self._work_s, self._busy_s = self._fast_work_s, self._fast_busy_s
            self._num_apart = 0.0
        self.value = self._work_s / self._busy_s
        self.is_measured = True
