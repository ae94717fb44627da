"""What a leader does for a step of 1,024 decoding sequences: ``python -m tests.measurements.schedule``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import make_batch
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.request import Request
from lepton_dist.engine.runner import StepResult
from lepton_dist.plan.plan import EngineLimits

SEQUENCES, PROMPT, STEPS = 1024, 256, 60


def timed(spent: list[float], run: Callable[[], Any]) -> Any:
    """What `run` gives; its processor milliseconds are added to `spent`."""
    start = time.thread_time()
    result = run()
    spent.append(1000 * (time.thread_time() - start))
    return result


def main() -> None:
    """Print the medians."""
    limits = EngineLimits(max_sequences=SEQUENCES, max_batch_tokens=SEQUENCES * PROMPT)

    def no_scanner(*_: object) -> None:
        raise ValueError("no request has stop strings")

    engine = Engine(limits, SEQUENCES * 40, 1, (), no_scanner)  # type: ignore[arg-type]
    for index in range(SEQUENCES):
        prompt = [(index * 31 + place * 7) % 30000 for place in range(PROMPT)]
        engine.add(Request(str(index), prompt, SamplingParams(max_tokens=300, temperature=1.0, seed=index)))
    schedule: list[float] = []
    whole: list[float] = []
    apply: list[float] = []
    make: list[float] = []
    original = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: timed(schedule, original)  # type: ignore[method-assign]
    for step in range(STEPS):
        batch = timed(whole, engine.next_batch)
        timed(make, lambda number=step: make_batch(number, engine._in_flight[number]))
        tokens = np.full(SEQUENCES, 7, dtype=np.int32).tobytes()
        result = StepResult(batch.step, tokens, {}, [])
        timed(apply, lambda result=result: engine.apply(result))
    for name, values in (("schedule()", schedule), ("next_batch()", whole), ("make_batch()", make), ("apply()", apply)):
        print(f"{name}, {SEQUENCES} running sequences: {statistics.median(values[5:]):.2f} ms")


if __name__ == "__main__":
    main()
