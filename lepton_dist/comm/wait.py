"""Waiting without hanging and without heating the machine.

`wait_until` is for a rank in the middle of an operation: it spins, then yields the core (ranks may outnumber cores),
then sleeps for a small part of the time already waited. Where a quota gives a rank less than a core it sleeps sooner:
time spent on waiting would be missing when there is work. `Backoff` is for loops that may be idle for hours.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from lepton_dist.comm.launcher import is_rationed
from lepton_dist.comm.patience import Patience
from lepton_dist.errors import RankLostError
from lepton_dist.telemetry.stopwatch import Stopwatch

SPINS = 50
GRACE_S, RATIONED_GRACE_S = 0.005, 0.0005
SHORTEST_SLEEP_S = 50e-6
LONGEST_SLEEP_S = 1e-3
# A sleep is at most this part of the time already waited, which bounds what sleeping adds to a wait.
_SLEEP_PART = 0.02


class _Manners(threading.local):
    """How this thread waits."""

    sleeps_at_once = False


_MANNERS = _Manners()


def sleep_at_once() -> None:
    """From here on this thread waits asleep, as another one computes on its core meanwhile."""
    _MANNERS.sleeps_at_once = True


def wait_until(
    ready: Callable[[], bool],
    patience: Patience,
    what: Callable[[], str],
    idle: Callable[[], object] | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Return as soon as `ready()` is true.

    `what` describes the operation and the peers that are missing; it is called only when the deadline has passed.
    `idle` is called before each sleep: a wait that does not itself call MPI lets MPI make progress there. Sleeping
    begins after `grace_s`, which is longer where `ready` itself moves data, but soon where cores are rationed.

    Raises:
        RankLostError: the deadline of `patience` has passed.
    """
    is_polite = _MANNERS.sleeps_at_once
    for _ in range(1 if is_polite else SPINS):
        if ready():
            return
    stopwatch = Stopwatch()  # not the clock: a job that was suspended goes on
    seconds, phase = patience.seconds, patience.phase
    grace_s = 0.0 if is_polite else min(grace_s, RATIONED_GRACE_S) if is_rationed() else grace_s
    while True:
        if ready():
            return
        waited = stopwatch.look()
        if waited < grace_s:
            os.sched_yield()
            continue
        if waited > seconds:
            raise RankLostError(f"while {phase}: waited {seconds:g} s for {what()}")
        if idle is not None:
            idle()
        time.sleep(min(max(waited * _SLEEP_PART, SHORTEST_SLEEP_S), LONGEST_SLEEP_S))


class Backoff:
    """Sleeps for a loop that finds nothing to do: 50 us at first, then a small part of the time already waited.

    So what it adds to a wait stays small, and a loop that is idle for long sleeps `longest_s` at a time.
    """

    def __init__(self, longest_s: float = 0.01) -> None:
        self._longest_s = longest_s
        self._since_s: float | None = None

    def idle(self) -> None:
        """There was nothing to do: sleep, a little longer than the last time."""
        now = time.perf_counter()
        if self._since_s is None:
            self._since_s = now
        time.sleep(min(max((now - self._since_s) * _SLEEP_PART, SHORTEST_SLEEP_S), self._longest_s))

    def busy(self) -> None:
        """There was something to do: the next sleep is short again."""
        self._since_s = None
