"""The largest score of each row, by the compiled kernel and by torch."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lepton_dist.kernels.row_maxima import row_maxima
from tests.plain_torch import plain_torch

FEW = st.sampled_from([0.0, -0.0, 1.0, -3.5, math.inf, -math.inf])


@given(st.lists(FEW, min_size=1, max_size=80))
def test_the_lowest_of_those_that_tie(scores: list[float]) -> None:
    values, places = row_maxima(torch.tensor([scores, scores]))
    assert values.tolist() == [max(scores)] * 2
    assert places.tolist() == [scores.index(max(scores))] * 2


@pytest.mark.parametrize("count", [1, 31, 32, 1023, 1025, 32_000])
def test_sizes_around_the_steps_of_the_kernel(count: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(9, count)
    found = row_maxima(scores)
    with plain_torch():
        wanted = row_maxima(scores)
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("place", [0, 5, 32, 1030, 2047, 2049])
def test_a_row_with_something_that_is_no_number(place: int) -> None:
    scores = torch.randn(3, 2050)
    scores[1, place] = math.nan
    values, _ = row_maxima(scores)
    assert values.isnan().tolist() == [False, True, False]
