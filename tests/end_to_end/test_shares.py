"""Uneven shares on two ranks of unequal speed, measured: what the planner proposes pays.

Wants two quiet cores for some minutes. The whole of it: ``shares_job.py`` with 5 repeats of 16 prompts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lepton_dist.bench.shapes import shaped_model
from tests.harness import run


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_shares_by_speed_pay_in_prefill(tmp_path: Path) -> None:
    model = shaped_model("160m", tmp_path)
    job = run(["-m", "tests.end_to_end.shares_job", model, "3", "8"], ranks=2, seconds=600)
    assert job.returncode == 0, job.report()
    line = json.loads(next(text for text in job.stdout.splitlines() if text.startswith("{")))
    print(json.dumps(line))
    assert line["shares"]["0"] > 1.3 * line["shares"]["1"]
    assert line["prefill_gain"] >= 1.25
