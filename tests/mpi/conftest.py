"""Fixtures of the cases that run inside mpirun: one world a process, and a group over all ranks for each carrier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lepton_dist.comm.group import Group
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.select import LAST_BUCKET, Choice, Table
from lepton_dist.comm.world import World, open_world

HERE = Path(__file__).parent
CARRIERS = [Choice("shm", "flat"), Choice("shm", "two_phase"), Choice("mpi", "gather"), Choice("mpi", "exchange")]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytest-mpi takes this folder's name for its mark, and so skips the tests that start mpirun: let them run."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("mpi") is None:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    from mpi4py import MPI  # noqa: F401  started here and not by the world, which would end it before pytest-mpi's report

    opened = open_world(Patience(20.0, "testing"))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def everyone(world: World) -> Group:
    group = world.group(range(world.size), "everyone")
    assert set(group.transports) == {"mpi", "shm"}, group.notices
    return group


@pytest.fixture(params=CARRIERS, ids=lambda choice: f"{choice.transport}-{choice.algorithm}")
def carried(everyone: Group, request: pytest.FixtureRequest) -> Iterator[Group]:
    """The group of all ranks, with everything carried by one transport and algorithm."""
    before = everyone.table
    assert before is not None
    choice = request.param
    rows = {name: ((LAST_BUCKET, Choice(choice.transport)),) for name in before.rows}
    rows["all_reduce"] = ((LAST_BUCKET, choice),)
    everyone.use_table(Table(rows))
    yield everyone
    everyone.use_table(before)
