"""A rank that dies while others wait for it on a GPU: a named error within the deadline, and no hang."""

from __future__ import annotations

import textwrap

import pytest
import torch

from lepton_dist.comm.devices import nccl_problem
from tests.harness import run

HEAD = """
import os, time, torch
from lepton_dist.comm.devices import Devices, see_gpus
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.world import open_world
from lepton_dist.errors import LeptonError
from lepton_dist.plan.devices import Binding
world = open_world(Patience(5.0, "stepping"))
sight = see_gpus()
"""
SHARED = """
bindings = [Binding(0, sight.gpus[0], 2)] * 2
"""
OWN = """
bindings = [Binding(rank, sight.gpus[rank]) for rank in range(2)]
"""
BODY = """
devices = Devices.of(world.rank, bindings, [sight] * 2, world.patience)
group = devices.serve(world.group(range(2), "layers"))
x = torch.ones(1024, device=devices.device)
try:
    group.all_reduce(x)
    print(f"RANK {world.rank} over {group.gpu_transport}", flush=True)
    if world.rank == 1:
        time.sleep(60)
    group.all_reduce(x)
    event = torch.cuda.Event()
    event.record()
    devices.wait.until(event, "step 2")
except LeptonError as error:
    print(f"ERROR {error}", flush=True)
    world.abort(error.exit_code)
"""


def program(bindings: str) -> list[str]:
    return ["-c", textwrap.dedent(HEAD + bindings + BODY)]


def test_staged() -> None:
    job = run(program(SHARED), ranks=2, seconds=90)
    assert job.returncode == 70 and "RANK 0 over staged" in job.stdout, job.report()
    assert "ERROR while stepping" in job.stdout and "rank 1" in job.stdout, job.report()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.skipif(bool(nccl_problem()), reason=f"CuPy's NCCL cannot be loaded: {nccl_problem()}")
def test_nccl() -> None:
    job = run(program(OWN), ranks=2, seconds=90)
    assert job.returncode == 70 and "RANK 0 over nccl" in job.stdout, job.report()
    assert "ERROR while stepping: waited 5 s for the GPU of rank 0 to end step 2" in job.stdout, job.report()
