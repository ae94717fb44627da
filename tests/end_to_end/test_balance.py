"""Two replicas of unequal speed, measured: how near the makespan comes to the bound, and other policies beside it.

Wants two quiet cores for a quarter of an hour. The whole of it: ``balance_job.py``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lepton_dist.bench.shapes import shaped_model
from tests.harness import run

NUM_REQUESTS = 128


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_unequal_replicas_end_together(tmp_path: Path) -> None:
    model = shaped_model("160m", tmp_path)
    options = ["--requests", str(NUM_REQUESTS), "--repeats", "1", "--neighbours", "1"]
    job = run(["-m", "tests.end_to_end.balance_job", model, *options], ranks=2, seconds=1800)
    assert job.returncode == 0, job.report()
    lines = [json.loads(line) for line in job.stdout.splitlines() if line.startswith("{")]
    for line in lines:
        print(json.dumps(line))
    throughout, later = lines
    assert throughout["of_bound"]["predicted"] <= 1.08
    assert throughout["of_bound"]["round_robin"] > throughout["of_bound"]["predicted"]
    assert later["of_bound"]["predicted"] <= 1.15
