"""The spine's equality tests on GPUs: every family gives transformers' text, in float32, greedy and sampled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import torch

from lepton_dist.comm.devices import nccl_problem
from lepton_dist.comm.world import open_world
from lepton_dist.runtime.controller import Controller
from tests.harness import run
from tests.mpi.equality.cases import Outcome
from tests.mpi.equality.job import check
from tests.mpi.test_equality import Prepared, judge, openings, prepared

__all__ = ["prepared"]  # a fixture: pytest finds it by its name

ONE = {"gpu": "mesh: {tp: 1}\ndevice: cuda"}
SHARED = {
    "shared-tp2": "mesh: {tp: 2}\ndevice: cuda\nranks_per_gpu: 2",
    "shared-pp2": "mesh: {pp: 2}\ndevice: cuda\nranks_per_gpu: 2",
}
MIXED = {
    "gpu-cpu": "replicas: [{stages: [{ranks: [0], device: cuda}, {ranks: [1], device: cpu}]}]",
    "cpu-gpu": "replicas: [{stages: [{ranks: [0], device: cpu}, {ranks: [1], device: cuda}]}]",
    "replicas": "replicas: [{stages: [{ranks: [0], device: cuda}]}, {stages: [{ranks: [1], device: cpu}]}]",
}
TWO = {"tp2": "mesh: {tp: 2}\ndevice: cuda", "pp2": "mesh: {pp: 2}\ndevice: cuda", "dp2": "mesh: {dp: 2}\ndevice: cuda"}


def run_ranks(prepared: list[Prepared], plans: Mapping[str, str], folder: Path) -> None:
    todo = openings(prepared, plans)
    source, target = folder / "openings.json", folder / "outcome.json"
    source.write_bytes(msgspec.json.encode(todo))
    job = run(["-m", "tests.mpi.equality.job", source, target], ranks=2, seconds=480)
    assert job.returncode == 0, job.report()
    judge(msgspec.json.decode(target.read_bytes(), type=Outcome), todo)


def test_one_rank(prepared: list[Prepared]) -> None:
    todo = openings(prepared, ONE)
    judge(check(Controller(open_world()), todo), todo)


def test_shared_gpu(prepared: list[Prepared], tmp_path: Path) -> None:
    run_ranks(prepared, SHARED, tmp_path)


def test_mixed(prepared: list[Prepared], tmp_path: Path) -> None:
    run_ranks(prepared, MIXED, tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.skipif(bool(nccl_problem()), reason=f"CuPy's NCCL cannot be loaded: {nccl_problem()}")
def test_two_gpus(prepared: list[Prepared], tmp_path: Path) -> None:
    run_ranks(prepared, TWO, tmp_path)
