"""The matmul kernels of every kind against double precision, and the compiled ones against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.kernels.linear import make_weight, matrix_bytes
from lepton_dist.kernels.quantized import RoundedWeight

needs_panels = pytest.mark.skipif(native_library() is None, reason="no compiled kernels: not built, or no AVX2")
sizes = st.tuples(st.integers(1, 20), st.integers(1, 200), st.integers(1, 70))
# Values that share a scale of x, None for a whole row, and the number of steps that the largest of them gets.
ROUNDED_X = {"int8": (None, 1023), "int4": (32, 127), "int4-64": (64, 127), "int4-128": (128, 127)}


def case(rows: int, in_features: int, out_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, in] with a few large channels, as real activations have, and a weight [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator)
    x[:, ::50] *= 20
    return x, torch.randn(out_features, in_features, generator=generator) * 0.05


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@needs_panels
@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from((torch.float32, torch.bfloat16)))
def test_bfloat16_panels_equal_double_precision(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = case(*shape)
    x, weight = x.to(dtype), weight.bfloat16()
    y = PanelWeight(weight, "bfloat16").matmul(x)
    assert y.dtype == dtype and y.shape == (shape[0], shape[2])
    # float32 sums of up to 200 products; a bfloat16 result is rounded to 8 bits.
    assert error(y, x.double() @ weight.double().T) < (1e-6 if dtype == torch.float32 else 4e-3)


@needs_panels
@pytest.mark.parametrize("kind", ["int8", "int4", "int4-64", "int4-128"])
@settings(max_examples=60, deadline=None)
@given(shape=sizes)
def test_rounded_panels_equal_the_reference(kind: str, shape: tuple[int, int, int]) -> None:
    x, weight = case(*shape)
    dense = RoundedWeight(weight, kind).dense(torch.float64)
    y = PanelWeight(weight, kind).matmul(x)
    # At worst every x is off by half a step, always to the side of its weight; float32 sums come on top.
    width, steps = ROUNDED_X[kind]
    groups = [slice(k, k + width) for k in range(0, shape[1], width)] if width else [slice(None)]
    worst = sum(x[:, at].abs().amax(1, keepdim=True).double() / steps / 2 * dense[:, at].abs().sum(1) for at in groups)
    assert bool(((y.double() - x.double() @ dense.T).abs() <= worst * 1.001 + 1e-5).all())


@needs_panels
@pytest.mark.parametrize("kind", ["int4", "int4-64", "int4-128"])
@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(33, 50), st.integers(1, 1200), st.integers(1, 70)))
def test_expanded_panels_equal_the_reference(kind: str, shape: tuple[int, int, int]) -> None:
    x, weight = case(*shape)
    weight[:, : shape[1] // 2] *= 30  # scales of one row that lie far apart
    rounded = RoundedWeight(weight, kind)
    dense, scales = rounded.dense(torch.float64), rounded._scales.double().abs()
    y = PanelWeight(weight, kind).matmul(x)
    # Every x is off by half of 1/1023 of its row's largest, every weight by 8 times half of 1/511 of its row's scale.
    worst = x.abs().amax(1, keepdim=True).double() / 1023 / 2 * (dense.abs().sum(1) * 1.01)
    worst = worst + x.double().abs().sum(1, keepdim=True) * 4 / 511 * scales.amax((1, 2))
    assert bool(((y.double() - x.double() @ dense.T).abs() <= worst * 1.001 + 1e-5).all())


@needs_panels
@pytest.mark.parametrize("kind", ["int4", "int4-64", "int4-128"])
def test_sums_of_expanded_panels_do_not_overflow(kind: str) -> None:
    """The largest values everywhere, of one sign."""
    y = PanelWeight(torch.full((16, 4096), -1.0), kind).matmul(torch.ones(33, 4096))
    assert torch.allclose(y, torch.full((33, 16), -4096.0), rtol=1e-3)


@needs_panels
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("threads", [1, 3])
def test_more_rows_than_fit_a_chunk(kind: str, threads: int) -> None:
    x, weight = case(401, 96, 40)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = PanelWeight(weight.bfloat16(), kind).matmul(x)
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([PanelWeight(weight.bfloat16(), kind).matmul(row) for row in x.split(1)])
    # The order of additions depends on the number of rows; the rounding of x does not.
    # ... but that of int4, which takes x in 8 bits a group for a few rows, and in 11 for many: where a large channel
    # lies, half a step is 0.2 of the others, in most of the groups.
    assert error(together, alone.double()) < (2e-2 if kind == "int4" else 1e-6)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.012), ("int4", 0.12)])
def test_rounding_costs_what_its_bits_cost(kind: str, most: float) -> None:
    x, weight = case(64, 256, 128)
    exact = x.double() @ weight.double().T
    for form in (make_weight(weight, kind), RoundedWeight(weight, kind)):
        # Uniform rounding errors of the weights: 1/127 or 1/8 of the largest of a row or group, over sqrt(12).
        assert most / 4 < error(form.matmul(x), exact) < most


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_zeros_stay_zeros(kind: str) -> None:
    weight = torch.zeros(20, 64)
    weight[3, 5] = 1.0
    y = make_weight(weight, kind).matmul(torch.ones(2, 64))
    assert torch.count_nonzero(y[:, :3]) == 0 and torch.allclose(y[:, 3], torch.ones(2), atol=1e-3)
    assert torch.count_nonzero(make_weight(weight, kind).matmul(torch.zeros(2, 64))) == 0


@needs_panels
def test_int8_sums_do_not_overflow() -> None:
    """The largest values everywhere, over more inputs than 11 bits of x have room for."""
    ones = torch.ones(1, 40_000)
    assert float(PanelWeight(torch.ones(16, 40_000), "int8").matmul(ones)[0, 0]) == pytest.approx(40_000, rel=1e-3)


@needs_panels
@pytest.mark.parametrize("kind", ["int8", "int4", "int4-64", "int4-128"])
def test_bytes_are_those_that_are_told(kind: str) -> None:
    weight = PanelWeight(torch.randn(48, 200), kind)
    scales = 0 if weight._scales is None else weight._scales.nbytes
    assert weight._panels.nbytes + scales == matrix_bytes(kind, 48, 200)


def test_a_view_with_a_row_stride_is_read_in_place() -> None:
    x, weight = case(6, 64, 32)
    wide = torch.zeros(6, 100)
    wide[:, :64] = x
    form = make_weight(weight.bfloat16(), "int8")
    assert torch.equal(form.matmul(wide[:, :64]), form.matmul(x))
