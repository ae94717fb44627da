"""The table that chooses transports and algorithms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_dist.comm.select import LAST_BUCKET, OPERATIONS, Choice, Timing, bucket, default_table, measured_table

FLAT, TWO_PHASE, EXCHANGE = Choice("shm", "flat"), Choice("shm", "two_phase"), Choice("mpi", "exchange")


@given(st.integers(1, 2**50))
def test_a_bucket_holds_up_to_its_power_of_two(num_bytes: int) -> None:
    assert 2 ** bucket(num_bytes) >= num_bytes > 2 ** (bucket(num_bytes) - 1) or num_bytes == 1


@pytest.mark.parametrize(("transports", "nearest"), [(["local"], "local"), (["mpi", "shm"], "shm"), (["mpi"], "mpi")])
def test_defaults_take_the_nearest_transport_at_every_size(transports: list[str], nearest: str) -> None:
    table = default_table(transports)
    for operation in OPERATIONS:
        for num_bytes in (0, 1, 8192, 2**20, 2**40):
            assert table.choose(operation, num_bytes).transport == nearest


def test_defaults_change_the_algorithm_with_the_size() -> None:
    shm, mpi = default_table(["shm", "mpi"]), default_table(["mpi"])
    assert [shm.choose("all_reduce", size).algorithm for size in (8, 65536, 65537)] == ["flat", "flat", "two_phase"]
    assert [mpi.choose("all_reduce", size).algorithm for size in (8, 16384, 16385)] == ["gather", "gather", "exchange"]


def test_measurements_replace_defaults_up_to_the_largest_measured() -> None:
    timings = [
        Timing("all_reduce", 4096, FLAT, 5e-6),
        Timing("all_reduce", 4096, EXCHANGE, 9e-6),
        Timing("all_reduce", 32768, FLAT, 9e-6),
        Timing("all_reduce", 32768, EXCHANGE, 5e-6),
    ]
    table = measured_table(default_table(["shm", "mpi"]), timings)
    chosen = [table.choose("all_reduce", size) for size in (1, 4096, 4097, 32768, 2**16, 2**30)]
    assert chosen == [FLAT, FLAT, EXCHANGE, EXCHANGE, FLAT, TWO_PHASE]
    assert table.rows["broadcast"] == ((LAST_BUCKET, Choice("shm")),)


def test_neighbours_of_one_choice_are_one_step_and_ties_go_by_name() -> None:
    timings = [Timing("all_reduce", size, choice, 1e-6) for size in (64, 4096) for choice in (FLAT, EXCHANGE)]
    for order in (timings, list(reversed(timings))):
        table = measured_table(default_table(["mpi"]), order)
        assert table.rows["all_reduce"][:2] == ((12, EXCHANGE), (14, Choice("mpi", "gather")))


def test_lines_for_people() -> None:
    lines = default_table(["shm", "mpi"]).lines()
    assert lines[:2] == ["all_reduce up to 65536 bytes: shm, flat", "all_reduce beyond: shm, two_phase"]
