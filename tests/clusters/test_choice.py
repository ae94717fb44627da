"""Four hosts of half a core each: one of the planner's first two plans is the best there is, or next to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lepton_dist.bench.shapes import shaped_model
from tests.clusters import netns
from tests.clusters.test_generate import run_on

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_one_of_the_first_two_plans_is_near_the_best(tmp_path: Path) -> None:
    if reason := netns.reason_to_skip():
        pytest.skip(reason)
    model = shaped_model("160m", tmp_path)
    words = [sys.executable, "-m", "tests.end_to_end.choice_job", str(model), "--half", "--repeats", "3"]
    with netns.network_hosts(4) as hosts:
        done = run_on(hosts, 4, *words, seconds=3600)
    assert done.stderr.count("slowed by a quota") == 4, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for line in lines:
        print(json.dumps(line))
    assert lines[-1]["first_two_of_best"] >= 0.95
