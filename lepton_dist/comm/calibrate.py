"""Measures, at start-up, which transport and algorithm carry a group's operations fastest.

Bounded by time: slow cells get few repetitions, and when the time is over the larger sizes stay unmeasured. Every
number that decides anything is first reduced to the slowest rank's, so all ranks build the same table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.select import LAST_BUCKET, Choice, Table, Timing, measured_table

SIZES_BYTES = (4 << 10, 32 << 10, 256 << 10, 1 << 20)
OPERATIONS = ("all_reduce", "all_gather", "broadcast")
_MOST_CALLS = 30


def calibrate(group: Group, seconds: float = 0.15) -> list[Timing]:
    """Measure `group` for about `seconds`, make it use what was fastest, and return the measurements.

    Collective over the group. A group with one way to carry everything is left as it is, and gives no rows.

    Raises:
        RankLostError: a member did not come before the deadline.
    """
    base = group.table
    if base is None or all(len(group.choices(operation)) == 1 for operation in OPERATIONS):
        return []
    cells = [
        (operation, size, choice)
        for size in SIZES_BYTES
        for operation in OPERATIONS
        for choice in group.choices(operation)
    ]
    timings: list[Timing] = []
    start = time.perf_counter()
    for operation, size, choice in cells:
        group.use_table(Table({**base.rows, operation: ((LAST_BUCKET, choice),)}))
        call = _call(group, operation, size)
        call()  # makes the routine and touches the memory
        once, spent = _slowest(group, base, _timed(call), time.perf_counter() - start)
        if spent > seconds:
            break
        calls = int(min(max(seconds / len(cells) / max(once, 1e-7), 1), _MOST_CALLS))
        group.use_table(Table({**base.rows, operation: ((LAST_BUCKET, choice),)}))
        median, _ = _slowest(group, base, statistics.median(_timed(call) for _ in range(calls)), 0.0)
        timings.append(Timing(operation, size, choice, median))
    complete = _complete_rows(group, timings)
    group.use_table(measured_table(base, complete))
    return timings


def report(timings: list[Timing]) -> list[str]:
    """The measurements in words, one line a cell, for `doctor`."""
    return [
        f"{row.operation} of {row.num_bytes} bytes over {row.choice.transport}, {row.choice.algorithm}: "
        f"{row.seconds * 1e6:.1f} us"
        for row in timings
    ]


def _call(group: Group, operation: str, size_bytes: int) -> Callable[[], object]:
    tensor = torch.zeros(size_bytes // 2, dtype=torch.bfloat16)
    if operation == "all_reduce":
        return lambda: group.all_reduce(tensor)
    if operation == "all_gather":
        return lambda: group.all_gather(tensor)
    return lambda: group.broadcast(tensor)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _slowest(group: Group, base: Table, *seconds: float) -> tuple[float, float]:
    """The largest of each number over all ranks, carried by the base table, which is known to be the same on all."""
    group.use_table(base)
    first, second = group.all_reduce(torch.tensor(seconds, dtype=torch.float64), op="max").tolist()
    return first, second


def _complete_rows(group: Group, timings: list[Timing]) -> list[Timing]:
    """Only sizes of which every choice was measured: half a comparison decides nothing."""
    measured: dict[tuple[str, int], set[Choice]] = {}
    for row in timings:
        measured.setdefault((row.operation, row.num_bytes), set()).add(row.choice)
    return [row for row in timings if measured[row.operation, row.num_bytes] == set(group.choices(row.operation))]
