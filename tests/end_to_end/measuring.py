"""What the measuring jobs share: a rank on a core of its own, one program on rank 0, and the clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from lepton_dist.comm.launcher import read_launcher
from lepton_dist.engine.request import Request
from lepton_dist.plan.plan import EngineLimits
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.interrupts import Interrupts
from lepton_dist.runtime.run import run

CORES = sorted(os.sched_getaffinity(0))
ENGINE = EngineLimits(max_sequences=16, prefix_cache=False, context_tokens=1024)


def pin() -> int:
    """Keep this process on the core of its rank, which is returned."""
    rank = read_launcher().rank
    os.sched_setaffinity(0, {CORES[rank % len(CORES)]})
    return rank


def run_measurement(measure: Callable[[Controller], None]) -> int:
    """Measure on rank 0, serve on the others; the exit code."""

    def program(controller: Controller, interrupts: Interrupts) -> int:
        measure(controller)
        return 0

    return run(program)


def seconds_for(
    controller: Controller, requests: Sequence[Request], meanwhile: Callable[[float], None] | None = None
) -> float:
    """From the first request to the last; `meanwhile` is told again and again how long it has been."""
    start = time.perf_counter()
    for request in requests:
        controller.submit(request)
    while controller.num_outstanding:
        controller.advance()
        if meanwhile is not None:
            meanwhile(time.perf_counter() - start)
    return time.perf_counter() - start
