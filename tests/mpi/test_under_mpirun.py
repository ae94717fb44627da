"""Starts the cases of this folder on 2, 3 and 4 ranks, each rank count in one mpirun with a deadline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run

HERE = Path(__file__).parent
# The conftest above this folder hides launchers from tests; these tests live under one.
PYTEST = ["-m", "pytest", "--with-mpi", "-q", "-x", "-p", "no:cacheprovider", f"--confcutdir={HERE}"]


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_cases(ranks: int) -> None:
    cases = sorted(HERE.glob("cases_*.py"))
    job = run([*PYTEST, *cases], ranks=ranks, seconds=150)
    assert job.returncode == 0, job.report()
    assert job.stdout.count(" passed") == ranks, job.report()
    assert " skipped" not in job.stdout, job.report()
