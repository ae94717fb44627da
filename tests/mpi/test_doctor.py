"""`lepton-dist doctor` as a user starts it: alone, and under mpirun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import run

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "examples" / "tiny-stdlib"
DOCTOR = ["-m", "lepton_dist.cli.main", "doctor"]


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_sound_machine_passes_within_a_minute(ranks: int | None, tmp_path: Path) -> None:
    job = run([*DOCTOR, "--json", "--model", MODEL, "--output", tmp_path], ranks=ranks, seconds=60)
    assert job.returncode == 0 and job.left == (), job.report()
    report = json.loads(job.stdout)  # one object, from rank 0 alone
    checks = {check["topic"]: check for check in report["checks"]}
    assert "FAIL" not in {check["verdict"] for check in checks.values()}, job.report()
    for topic in ("model", "model on nodes", "plan", "tokenizer", "output", "MPI"):
        assert checks[topic]["verdict"] == "OK", job.report()
    assert "MPICH" in checks["MPI"]["found"] or "Open MPI" in checks["MPI"]["found"]
    assert [facts["rank"] for facts in report["ranks"]] == list(range(ranks or 1))
    pairs = [pair for facts in report["ranks"] for pair in facts["pairs"]]
    if ranks is None:
        assert pairs == [] and "inside nodes" not in checks
        return
    assert [(pair["first"], pair["second"]) for pair in pairs] == [(0, 1)]
    assert {"inside nodes", "collectives, node"} <= set(checks)
    (group,) = report["ranks"][0]["groups"]
    assert group["transports"] == ["mpi", "shm"] and group["timings"] and not group["notices"]
    assert "the ranks of a node share a window" in checks["shared memory"]["found"]


def test_a_failed_check_is_exit_code_2_with_what_to_do(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("mesh: {pp: 3}\n")
    arguments = ["--model", MODEL, "--plan", plan, "--output", tmp_path / "absent"]
    job = run([*DOCTOR, *arguments], ranks=2, seconds=60)
    assert job.returncode == 2 and job.left == (), job.report()
    lines = job.stdout.splitlines()
    assert sum(line.startswith("FAIL") for line in lines) == 2, job.report()
    assert f"{plan}:1: mesh: dp 1 x pp 3 x tp 1 = 3 ranks, but the job has 2" in " ".join(job.stdout.split())
    assert "-> correct the file, or start another number of ranks" in job.stdout
    assert "Traceback" not in job.stdout + job.stderr


def test_a_wrong_launcher_is_told_without_a_table() -> None:
    job = run(DOCTOR, env={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, seconds=60)
    assert job.returncode == 2, job.report()
    assert "the launcher and the MPI library do not belong together" in job.stderr, job.report()
