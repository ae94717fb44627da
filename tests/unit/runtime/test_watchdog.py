"""The watchdog, in processes of its own: it ends them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(body: str) -> subprocess.CompletedProcess[str]:
    code = "import time\nfrom lepton_dist.runtime.watchdog import Watchdog\n" + body
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)


def test_it_ends_a_stuck_rank_and_says_where_it_was() -> None:
    done = run(
        "def stuck_here():\n    time.sleep(15)\n"
        "with Watchdog('rank 3 on host n7 (pid 1)', 30, phase='loading') as dog:\n"
        "    dog.feed(timeout_s=0.3, phase='decoding')\n    stuck_here()\n"
    )
    assert done.returncode == 70
    assert "rank 3 on host n7 (pid 1) made no progress for 0.3 s while decoding" in done.stderr
    assert "stuck_here" in done.stderr


def test_fed_or_disarmed_it_stays_quiet() -> None:
    done = run(
        "dog = Watchdog('rank 0', 0.4)\n"
        "for _ in range(8):\n    time.sleep(0.1); dog.feed()\n"
        "dog.feed(timeout_s=5); time.sleep(0.6)\n"
        "dog.feed(timeout_s=0.3); dog.disarm(); time.sleep(0.6); print('alive')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


@pytest.mark.slow
def test_it_ends_a_rank_whose_interpreter_is_locked() -> None:
    # PyDLL keeps the interpreter's lock during the call, so no Python thread can run.
    done = run("import ctypes\nWatchdog('rank 0', 0.2)\nctypes.PyDLL(None).sleep(15)\n")
    assert done.returncode not in (0, 70)
    assert "Timeout" in done.stderr
