"""The watchdog, in processes of its own: it ends them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_it_beats_and_stops_when_it_is_disarmed() -> None:
    done = run(
        "beats = []\n"
        "dog = Watchdog('rank 0', 5, beat=beats.append)\n"
        "dog.feed(timeout_s=7.0); time.sleep(1.3); dog.disarm(); print(beats)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[65.0, 67.0, 0.0]\n", "")
