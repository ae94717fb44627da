"""NCCL's unique id over a group's own links, on real MPI ranks. It needs CuPy and NCCL, but no GPU."""

from __future__ import annotations

import pytest
import torch

from lepton_dist.comm.devices import nccl_problem
from tests.harness import run

PROGRAM = """
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.world import open_world
world = open_world(Patience(20.0, "testing"))
from lepton_dist.comm.transports.nccl import ID_BYTES, share_id
everyone = world.group(range(world.size), "everyone")
rest = world.group(range(1, world.size), "rest") if world.rank else None
for group in filter(None, (everyone, rest)):
    first, second = share_id(group), share_id(group)
    assert len(first) == ID_BYTES and first != second
    print(f"ID {group.name} {first.hex()}", flush=True)
world.close()
"""

needs_nccl = pytest.mark.skipif(bool(nccl_problem()), reason=f"CuPy's NCCL cannot be loaded ({nccl_problem()})")


@needs_nccl
def test_every_member_gets_the_id_that_the_first_made() -> None:
    job = run(["-c", PROGRAM], ranks=3, seconds=60)
    assert job.returncode == 0, job.report()
    ids = [part.split()[:2] for part in job.stdout.split("ID ")[1:]]
    for name, count in (("everyone", 3), ("rest", 2)):
        found = [made for group, made in ids if group == name]
        assert len(found) == count and len(set(found)) == 1 and set(found[0]) != {"0"}, job.report()


@needs_nccl
def test_joining_without_a_gpu_says_so_instead_of_hanging() -> None:
    body = """
import torch
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.world import open_world
from lepton_dist.errors import RankLostError
world = open_world(Patience(20.0, "testing"))
from lepton_dist.comm.transports.nccl import join
try:
    join(world.group(range(2), "pair"), torch.device("cuda", 0), world.patience)
except RankLostError as error:
    print(f"ERROR {error}", flush=True)
world.close()
"""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    job = run(["-c", body], ranks=2, seconds=60)
    assert job.returncode == 0, job.report()
    assert job.stdout.count("ERROR NCCL to join the ranks [0, 1] of group 'pair'") == 2, job.report()
