"""Time that counts for a deadline, with a process that is really stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lepton_dist.telemetry.stopwatch import LONGEST_LOOK_S, Stopwatch

ROOT = Path(__file__).parents[3]


def test_it_counts_what_lies_between_two_looks_but_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lepton_dist.telemetry.stopwatch.time.perf_counter", lambda: now[0])
    stopwatch = Stopwatch()
    for passes, reads in ((0.25, 0.25), (0.5, 0.75), (3600.0, 0.75 + LONGEST_LOOK_S), (0.0, 1.75)):
        now[0] += passes
        assert stopwatch.look() == pytest.approx(reads)
    stopwatch.restart()
    assert stopwatch.look() == 0.0


WAITS = """
import threading, time
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.wait import wait_until
from lepton_dist.runtime.watchdog import Watchdog
with Watchdog("rank 0", 3.0):
    print("waiting", flush=True)
    start = time.process_time()
    {body}
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("body", "code"),
    [
        # 1.2 s of a patience of 3 s, while the process is stopped for 4 s in the middle.
        ("ready = threading.Event(); threading.Timer(0.0, lambda: [time.sleep(0.1) for _ in range(12)] and ready.set()"
         ").start(); wait_until(ready.is_set, Patience(3.0), str)", 0),
        ("wait_until(lambda: False, Patience(1.0), lambda: 'nothing')", 1),
        ("time.sleep(30)", 70),  # stuck: the watchdog's 3 s are its own, with the process running
    ],
    ids=["goes on", "gives up", "is stuck"],
)  # fmt: skip
def test_a_stopped_process_has_the_time_it_was_stopped_for(body: str, code: int) -> None:
    command = [sys.executable, "-c", WAITS.format(body=body)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4.0)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert (out == "done\n") == (code == 0)
    assert ("made no progress for 3 s" in err) == (code == 70)
