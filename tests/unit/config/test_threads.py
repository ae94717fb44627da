"""How many threads a rank takes of those that it is asked to."""

from __future__ import annotations

import os

import pytest

from lepton_dist.config.machine import asked_threads, useful_threads


@pytest.mark.parametrize(
    ("said", "found"),
    [("4", 4), ("4,2", 4), (" 3 , 1", 3), ("", None), ("many", None), ("0", None), ("-2", None)],
)
def test_what_the_job_asks_for(said: str, found: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert asked_threads() == found


def test_more_threads_than_cores_are_not_taken() -> None:
    threads, warning = useful_threads(4096, 1)
    assert threads == 1 and "4096 threads" in warning and f"{len(os.sched_getaffinity(0))} core" in warning
    assert useful_threads(1, 1) == (1, "")
