"""Deadlines, waits and idle loops."""

from __future__ import annotations

import time
from itertools import accumulate

import pytest

from lepton_dist.comm import wait
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.wait import Backoff, wait_until
from lepton_dist.errors import RankLostError


def test_phases_nest_and_come_back_after_an_error() -> None:
    patience = Patience(5.0, "starting")
    with pytest.raises(KeyError), patience.during("loading", 600), patience.during("reading", 60):
        assert (patience.seconds, patience.phase) == (60, "reading")
        raise KeyError
    assert (patience.seconds, patience.phase) == (5.0, "starting")
    with pytest.raises(ValueError, match="more than 0 seconds, not 0"), patience.during("loading", 0):
        pass


def test_a_wait_ends_at_its_deadline_with_its_phase_and_purpose() -> None:
    start = time.monotonic()
    with pytest.raises(RankLostError, match=r"^while loading: waited 0\.05 s for the index$"):
        wait_until(lambda: False, Patience(0.05, "loading"), lambda: "the index")
    assert 0.05 <= time.monotonic() - start < 1.0


def test_a_wait_returns_when_ready_and_describes_nothing() -> None:
    polls = iter([False] * 80)
    wait_until(lambda: next(polls, True), Patience(), lambda: pytest.fail("described"))


def test_a_long_wait_sleeps_and_calls_idle() -> None:
    start, used, idles = time.perf_counter(), time.process_time(), []
    wait_until(lambda: time.perf_counter() - start > 0.5, Patience(), str, lambda: idles.append(1))
    assert time.process_time() - used < 0.15
    assert len(idles) > 50


def test_a_rank_with_a_part_of_a_core_sleeps_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    def used_by_short_waits() -> float:
        used = time.process_time()
        for _ in range(25):
            start = time.perf_counter()
            wait_until(lambda start=start: time.perf_counter() - start > 0.004, Patience(), str)  # type: ignore[misc]
        return time.process_time() - used

    monkeypatch.setattr(wait, "is_rationed", lambda: False)
    spinning = used_by_short_waits()
    monkeypatch.setattr(wait, "is_rationed", lambda: True)
    assert used_by_short_waits() < 0.5 * spinning


def test_backoff_grows_to_its_longest_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "perf_counter", lambda: sum(slept))
    backoff = Backoff()
    for _ in range(1000):
        backoff.idle()
    assert slept[0] == 50e-6 and slept == sorted(slept) and slept[-1] == 0.01
    # A twentieth of a wait of a tenth of a second at most.
    assert all(sleep <= 0.005 for sleep, waited in zip(slept, accumulate(slept), strict=True) if waited < 0.1)
    backoff.busy()
    backoff.idle()
    assert slept[-1] == 50e-6


def test_an_idle_loop_costs_almost_nothing() -> None:
    backoff, start, used = Backoff(), time.perf_counter(), time.thread_time()
    while time.perf_counter() - start < 1.0:
        backoff.idle()
    assert (time.thread_time() - used) / (time.perf_counter() - start) < 0.03
