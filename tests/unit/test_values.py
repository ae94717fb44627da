"""The one door for settings: what is let in, and what a refusal says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lepton_dist.errors import UsageError
from lepton_dist.plan.plan import Precision
from lepton_dist.plan.precision import QUANTIZED, decide_dtypes
from lepton_dist.values import FLOATS, MOST_THREADS, checked_dtype, checked_seconds, checked_threads, checked_whole


@pytest.mark.parametrize("value", [*QUANTIZED, "bf16", "float64", "float8", "", None, 16, [], True])
def test_a_dtype_that_is_none(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^dtype is .*float32, bfloat16, float16.*precision: \{weights: int8\}"):
        checked_dtype(value)
    if value is not None:  # which means "not given"
        # As an override it would set the KV cache too: rounded without a scale it gives broken text.
        with pytest.raises(UsageError, match="dtype"):
            decide_dtypes(Precision(), value, "bfloat16")


@pytest.mark.parametrize("value", FLOATS)
def test_a_dtype(value: str) -> None:
    assert checked_dtype(value) == value


@pytest.mark.parametrize("value", [-1, MOST_THREADS + 1, 10**400, 1.0, "2", None, True])
def test_threads_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^threads is .*; it must be a whole number from 0 to 1024$"):
        checked_threads(value)


def test_numbers() -> None:
    assert checked_threads(0) == 0 and checked_threads(MOST_THREADS) == MOST_THREADS
    assert checked_whole("n", 3, 1, 3) == 3
    assert checked_seconds("grace", 0, is_zero_allowed=True) == 0.0
    for value in (0, -1, math.nan, math.inf, 1e9, "1", None, False):
        with pytest.raises(ValueError, match=r"^grace is .*number of seconds, above 0"):
            checked_seconds("grace", value, is_zero_allowed=False)
