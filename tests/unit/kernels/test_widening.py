"""Products without compiled kernels: of rounded and of bfloat16 weights, against double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_dist.kernels import widening
from lepton_dist.kernels.linear import DenseWeight
from lepton_dist.kernels.quantized import RoundedWeight

sizes = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 90))
KINDS = ["int8", "int4", "int4-128"]
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}
"""By dtype of x: what a result is off at most, of itself. Few rows of x are rounded twice, by 2^-8."""


def case(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, in_features, out_features = shape
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, in_features, generator=generator), torch.randn(
        out_features, in_features, generator=generator
    )


def assert_equal(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """To what float32 sums of so many products lose, and the rounding of the result."""
    exact, worst = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    assert bool(((y.double() - exact).abs() <= worst * 1e-6 + exact.abs() * ROUNDED[x.dtype] + 1e-30).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(shape=sizes, block=st.sampled_from([1, 2_000, widening._BLOCK_WEIGHTS]))
def test_rounded_weights(dtype: torch.dtype, kind: str, shape: tuple[int, int, int], block: int) -> None:
    x, weight = case(shape)
    rounded = RoundedWeight(weight, kind)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(widening, "_BLOCK_WEIGHTS", block)
        y = rounded.matmul(x.to(dtype))
    assert y.dtype == dtype
    assert_equal(y, x.to(dtype), rounded.dense(torch.float64))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 16), out_features=st.integers(1, 90), sixteens=st.integers(1, 20), skipped=st.integers(0, 3)
)
def test_few_rows_that_lie_anywhere(tokens: int, out_features: int, sixteens: int, skipped: int) -> None:
    """Torch's product with int8 takes whole vectors from aligned addresses only."""
    x, weight = case((tokens + 1, sixteens * 16, out_features))
    x, rounded = x.bfloat16(), RoundedWeight(weight, "int8")
    wide = torch.cat([torch.zeros(tokens + 1, skipped, dtype=x.dtype), x], dim=1)
    for rows in (x[:tokens], x[1:], wide[1:, skipped:]):
        assert_equal(rounded.matmul(rows), rows, rounded.dense(torch.float64))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_result_wider_than_its_input(kind: str) -> None:
    x, weight = case((40, 200, 30))
    wide = RoundedWeight(weight, kind).matmul(x.bfloat16(), torch.float32)
    assert wide.dtype == torch.float32 and not torch.equal(wide, wide.bfloat16().float())


@pytest.mark.parametrize("is_slow", [False, True])
@settings(max_examples=60, deadline=None)
@given(shape=sizes)
def test_bfloat16_weights(is_slow: bool, shape: tuple[int, int, int]) -> None:
    x, weight = (part.bfloat16() for part in case(shape))
    form = DenseWeight(weight)
    form._is_slow = is_slow  # as the torch of another machine may be
    y = form.matmul(x)
    assert y.dtype == torch.bfloat16
    # Torch's own product may add up in bfloat16 halves of a row: it is only measured to be near.
    exact, worst = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    most = 2.0**-8 if is_slow and shape[0] > 6 else 2.0**-7
    assert bool(((y.double() - exact).abs() <= worst * most).all())


def test_only_some_rows_are_widened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening, "_BLOCK_WEIGHTS", 20 * 64)
    seen: list[tuple[slice, tuple[int, ...]]] = []
    x, weight = case((3, 64, 50))

    def widen(rows: slice, wide: torch.Tensor) -> None:
        seen.append((rows, tuple(wide.shape)))
        wide.copy_(weight[rows])

    y = widening.widened_product(x, 50, widen)
    assert_equal(y, x, weight.double())
    assert seen == [(slice(0, 20), (20, 64)), (slice(20, 40), (20, 64)), (slice(40, 50), (10, 64))]
