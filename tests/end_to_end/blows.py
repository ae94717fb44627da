"""One rank of a running job is killed or stopped, and how the job must end then."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

from tests.end_to_end.rig import (
    MODEL,
    READY,
    SETTINGS,
    generate,
    launched,
    num_lines,
    rank_pids,
    wait_for,
    wait_for_guardian,
)
from tests.harness import Job

GONE_S = 10.0
HOST = re.escape(socket.gethostname())


def check_end(job: Job, number: signal.Signals, victim: int, pid: int) -> None:
    """After the blow: all gone in time, exit code 70, and a message with rank and host."""
    start_s = time.monotonic()
    end = job.wait(GONE_S)
    assert end.returncode == 70 and end.left == (), end.report()
    assert time.monotonic() - start_s < GONE_S, end.report()
    assert "Start the same command again to resume" in end.stderr
    if number == signal.SIGSTOP:
        wanted = rf"rank {victim} on host {HOST} \(pid {pid}\) has been stopped for 3 s; killing it"
    else:
        # Nobody but the launcher can say it. MPICH's names the host and a process, and before MPI has started not
        # always the right one; Open MPI's names the rank too.
        wanted = rf"(PID \d+ RUNNING AT {HOST}|rank {victim} with PID \d+ on node {HOST} exited on\s+signal 9)"
    assert re.search(wanted, end.stdout + end.stderr), end.report()


def strike(
    source: Path,
    output: Path,
    plan_file: Path,
    number: signal.Signals,
    victim: int,
    phase: str,
    python: Path | None = None,
) -> None:
    """Start a run on two ranks, strike one of them in a phase, and see that all end. `python` as in `launched`."""
    before = num_lines(output)
    words = generate(MODEL, source, output, *SETTINGS, "--plan", plan_file)
    with launched(2, words, python=python) as job:
        pid = rank_pids(job, 2)[victim]
        if phase == "start":
            wait_for_guardian(job, pid)
        else:
            wait_for(lambda: READY in job.stderr, job, "loaded")
        if phase == "decode":
            wait_for(lambda: num_lines(output) > before, job, "more rows")
        os.kill(pid, number)
        check_end(job, number, victim, pid)
