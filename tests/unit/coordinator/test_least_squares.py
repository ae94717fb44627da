"""Factors are found from what they cause, followed when they change, and kept sane when nothing tells of them."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lepton_dist.coordinator.least_squares import HIGHEST, LOWEST, FactorLearner


def observe(learner: FactorLearner, truth: list[float], source: random.Random, steps: int) -> None:
    for _ in range(steps):
        x = tuple(source.uniform(1e-3, 1.0) for _ in truth)
        learner.learn(x, sum(factor * value for factor, value in zip(truth, x, strict=True)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.2, 5.0), min_size=1, max_size=6), st.integers(0, 10**6))
def test_the_true_factors_are_found(truth: list[float], seed: int) -> None:
    learner = FactorLearner(len(truth))
    observe(learner, truth, random.Random(seed), 150)
    assert learner.factors == pytest.approx(truth, rel=0.05, abs=0.05)


def test_a_change_is_followed() -> None:
    learner, source = FactorLearner(3), random.Random(1)
    observe(learner, [1.0, 1.0, 1.0], source, 500)
    observe(learner, [4.0, 4.0, 1.0], source, 150)
    assert learner.factors == pytest.approx([4.0, 4.0, 1.0], rel=0.1)


def test_a_factor_that_nothing_tells_of_stays() -> None:
    learner = FactorLearner(2)
    for _ in range(5000):
        learner.learn((1.0, 0.0), 2.0)
    assert learner.factors == pytest.approx((2.0, 1.0), abs=1e-2)
    learner.learn((1.0, 1.0), 3.0)  # consistent: after 5,000 silent steps it must not throw the first factor about
    assert learner.factors == pytest.approx((2.0, 1.0), abs=1e-2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(1e-6, 1e3)), max_size=40))
def test_factors_stay_within_bounds(rows: list[tuple[float, float, float]]) -> None:
    learner = FactorLearner(2)
    for first, second, y in rows:
        learner.learn((first, second), y)
    assert all(LOWEST <= factor <= HIGHEST for factor in learner.factors)
