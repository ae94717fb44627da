"""What a slow disk costs a run: `python -m tests.measurements.disk`. The same rows with each fsync 0.3 s longer."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from lepton_dist.cli.main import main
from tests.end_to_end.rig import MODEL, arguments, write_rows

_DELAY_S, _NUM_ROWS = 0.3, 1500


def seconds(delay_s: float) -> tuple[float, int]:
    """Wall seconds of a run in a process of its own, and the number of its fsyncs."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        _run(delay_s, write_end)
    os.close(write_end)
    with os.fdopen(read_end) as told:
        took_s, count = told.read().split()
    os.waitpid(child, 0)
    return float(took_s), int(count)


def _run(delay_s: float, write_end: int) -> None:
    fsync, count = os.fsync, 0

    def slow(descriptor: int) -> None:
        nonlocal count
        count += 1
        time.sleep(delay_s)
        fsync(descriptor)

    os.fsync = slow
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"id": n, "prompt_token_ids": [5 + n % 90], "max_tokens": 16, "ignore_eos": True} for n in range(_NUM_ROWS)
        ]
        source = write_rows(Path(folder) / "in.jsonl", rows)
        start = time.perf_counter()
        code = main(["generate", *arguments(MODEL, source, Path(folder) / "out.jsonl", "--threads", "1")])
        took_s = time.perf_counter() - start
    os.write(write_end, f"{took_s} {count}".encode())
    os._exit(code)


if __name__ == "__main__":
    (plain_s, _), (slow_s, count) = seconds(0.0), seconds(_DELAY_S)
    more = f"{slow_s / plain_s - 1:+.0%}"
    print(f"{_NUM_ROWS} rows: {plain_s:.1f} s; with {count} fsyncs of {_DELAY_S} s {slow_s:.1f} s, {more}")
