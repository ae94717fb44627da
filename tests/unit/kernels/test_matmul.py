"""The matmul kernels of every kind against double precision, and the compiled ones against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.cpu.native import VectorLevel, native_library, vector_level
from lepton_dist.kernels.cpu.panels import matrix_bytes, panel_kind
from lepton_dist.kernels.linear import make_weight
from lepton_dist.kernels.quantized import RoundedWeight
from lepton_dist.plan.precision import INT4_GROUPS
from tests.unit.kernels.levels import has_tiles

needs_panels = pytest.mark.skipif(native_library() is None, reason="no compiled kernels: not built, or no AVX2")
at_each_level = pytest.mark.parametrize(
    "level",
    [
        pytest.param(
            level, marks=pytest.mark.skipif(vector_level() < level, reason=f"this machine has no {level.name}")
        )
        for level in (VectorLevel.AVX2, VectorLevel.AVX512)
    ],
)
whole_tiles = st.integers(1, 18).map(lambda steps: 64 * steps)  # inputs that matrix instructions take
sizes = st.tuples(st.integers(1, 30), st.integers(1, 1200), st.integers(1, 70))
INT4 = ["int4", "int4-64", "int4-128"]


def rounded_x(kind: str, level: VectorLevel) -> tuple[int, int]:
    """How many values of x share a scale, and the number of steps that the largest of them gets."""
    if level == VectorLevel.AVX512:
        return 512, 127
    return (1 << 20, 1023) if kind == "int8" else (INT4_GROUPS[kind], 127)


def worst_of_rounding(x: torch.Tensor, dense: torch.Tensor, width: int, steps: int) -> torch.Tensor:
    """Every x is off by half a step, always to the side of its weight."""
    groups = [slice(k, k + width) for k in range(0, x.shape[1], width)]
    return sum(x[:, at].abs().amax(1, keepdim=True).double() / steps / 2 * dense[:, at].abs().sum(1) for at in groups)


def case(rows: int, in_features: int, out_features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, in] with a few large channels, as real activations have, and a weight [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator)
    x[:, ::50] *= 20
    return x, torch.randn(out_features, in_features, generator=generator) * 0.05


def error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@at_each_level
@settings(max_examples=60, deadline=None)
@given(shape=sizes, dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_bfloat16_panels_equal_double_precision(
    level: VectorLevel, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, weight = case(*shape)
    x, weight = x.to(dtype), weight.bfloat16()
    y = PanelWeight.of(weight, "bfloat16", level).matmul(x)
    assert y.dtype == dtype and y.shape == (shape[0], shape[2])
    # float32 sums of up to 1,200 products, whose errors go by what is summed, not by what is left of it; AVX-512 takes
    # x in bfloat16, and a bfloat16 result is rounded to 8 bits.
    taken = (x.bfloat16() if level == VectorLevel.AVX512 else x).double()
    exact, summed = taken @ weight.double().T, taken.abs() @ weight.double().abs().T
    assert ((y.double() - exact).abs() <= 1e-6 * summed + (0 if dtype == torch.float32 else 4e-3) * exact.abs()).all()


@needs_panels
@settings(max_examples=60, deadline=None)
@given(in_features=st.integers(1, 70), out_features=st.integers(1, 100))
def test_bfloat16_panels_of_avx512_are_packed_below_it_too(in_features: int, out_features: int) -> None:
    weight = torch.randn(out_features, in_features).bfloat16()
    words = PanelWeight.of(weight, "bfloat16", VectorLevel.AVX512).packed.view(torch.bfloat16)
    padded = torch.zeros(-(-out_features // 32) * 32, in_features + in_features % 2, dtype=torch.bfloat16)
    padded[:out_features, :in_features] = weight
    # [panels, 32 features, pairs of k, 2] -> [panels, pairs of k, 32 features, 2]
    wanted = padded.view(-1, 32, padded.shape[1] // 2, 2).transpose(1, 2)
    assert torch.equal(words, wanted.reshape(-1))


@at_each_level
@pytest.mark.parametrize("kind", ["int8", *INT4])
@settings(max_examples=60, deadline=None)
@given(shape=sizes)
def test_rounded_panels_equal_the_reference(kind: str, level: VectorLevel, shape: tuple[int, int, int]) -> None:
    x, weight = case(*shape)
    if kind in INT4 and level == VectorLevel.AVX512 and has_tiles():
        x = x[:19]  # more are multiplied with expanded panels; without matrix instructions more than 63
    dense = RoundedWeight(weight, kind).dense(torch.float64)
    y = PanelWeight.of(weight, kind, level).matmul(x)
    worst = worst_of_rounding(x, dense, *rounded_x(kind, level))
    assert bool(((y.double() - x.double() @ dense.T).abs() <= worst * 1.001 + 1e-5).all())


@at_each_level
@pytest.mark.parametrize("kind", ["int8", *INT4])
def test_weights_round_as_the_reference_also_where_two_are_the_largest(kind: str, level: VectorLevel) -> None:
    """Of a group's largest magnitudes, of either sign, the first becomes -8."""
    weight = (case(1, 300, 70)[1] * 60).round_().clamp_(-3, 3)  # a few values: every group has several largest ones
    weight[::7] = 0
    form = PanelWeight.of(weight, kind, level)
    y = torch.cat([form.matmul(rows) for rows in torch.eye(300).split(16)])  # few rows: the panels are not expanded
    assert torch.allclose(y.T, RoundedWeight(weight, kind).dense(torch.float32), rtol=1e-5, atol=0)


@at_each_level
@pytest.mark.parametrize("kind", INT4)
@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(33, 90), st.integers(1, 1200) | whole_tiles, st.integers(1, 70)))
def test_expanded_panels_equal_the_reference(kind: str, level: VectorLevel, shape: tuple[int, int, int]) -> None:
    x, weight = case(*shape)
    weight[:, : shape[1] // 2] *= 30  # scales of one row that lie far apart
    rounded = RoundedWeight(weight, kind)
    dense, scales = rounded.dense(torch.float64), rounded._scales.double().abs().amax((1, 2))
    y = PanelWeight.of(weight, kind, level).matmul(x)
    if level == VectorLevel.AVX512:
        # Every weight is off by half of 8/127 of the largest scale, and by a little for scales rounded to 8 more bits.
        (width, steps), off = rounded_x(kind, level), 8 / 127 / 2 * 1.1
    else:
        # Every weight is off by 8 times half of 1/511 of its row's scale.
        (width, steps), off = rounded_x("int8", level), 4 / 511
    worst = worst_of_rounding(x, dense.abs() + off * scales[:, None], width, steps)
    worst = worst + x.double().abs().sum(1, keepdim=True) * off * scales
    assert bool(((y.double() - x.double() @ dense.T).abs() <= worst * 1.001 + 1e-5).all())


@at_each_level
@pytest.mark.parametrize("kind", INT4)
@pytest.mark.parametrize("rows", [50, 70])  # expanded from 33 on; on AVX-512 from 64 on, with AMX from 20
def test_sums_of_expanded_panels_do_not_overflow(kind: str, level: VectorLevel, rows: int) -> None:
    """The largest values everywhere, of one sign."""
    y = PanelWeight.of(torch.full((16, 4096), -1.0), kind, level).matmul(torch.ones(rows, 4096))
    assert torch.allclose(y, torch.full((rows, 16), -4096.0), rtol=1e-3)


@at_each_level
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shape", [pytest.param((601, 96, 40), id="chunks"), pytest.param((130, 1088, 300), id="shares")]
)
def test_more_rows_than_fit_a_chunk_and_several_panels_a_share(
    kind: str, level: VectorLevel, threads: int, shape: tuple[int, int, int]
) -> None:
    x, weight = case(*shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = PanelWeight.of(weight.bfloat16(), kind, level).matmul(x)
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([PanelWeight.of(weight.bfloat16(), kind, level).matmul(row) for row in x.split(1)])
    if level == VectorLevel.AVX512 and kind != "int4":
        assert torch.equal(together, alone)  # a row's sums are its own affair
        return
    # The order of additions depends on the number of rows; the rounding of x does not.
    # ... but int4 is expanded for many rows, to weights that are rounded once more or for x in 11 bits instead of 8.
    assert error(together, alone.double()) < (2e-2 if kind == "int4" else 1e-6)


@at_each_level
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(13, 50), whole_tiles, st.integers(1, 70)))
def test_many_rows_of_whole_tiles_equal_single_ones(kind: str, level: VectorLevel, shape: tuple[int, int, int]) -> None:
    x, weight = case(*shape)
    form = PanelWeight.of(weight.bfloat16(), kind, level)
    together, alone = form.matmul(x), torch.cat([form.matmul(row) for row in x.split(1)])
    if level == VectorLevel.AVX512:
        assert torch.equal(together, alone)  # a row's sums are its own affair
    assert error(together, alone.double()) < 1e-6


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.012), ("int4", 0.12)])
def test_rounding_costs_what_its_bits_cost(kind: str, most: float) -> None:
    x, weight = case(64, 256, 128)
    exact = x.double() @ weight.double().T
    forms = [RoundedWeight(weight, kind)]
    if vector_level() != VectorLevel.AVX512:
        forms.append(make_weight(weight, kind))
    for form in forms:
        # Uniform rounding errors of the weights: 1/127 or 1/8 of the largest of a row or group, over sqrt(12).
        assert most / 4 < error(form.matmul(x), exact) < most


@at_each_level
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.012), ("int4", 0.12)])
def test_activations_in_8_bits_cost_little_but_where_some_are_large(kind: str, most: float, level: VectorLevel) -> None:
    large, weight = case(64, 256, 128)
    even = torch.randn(large.shape, generator=torch.Generator().manual_seed(1))
    form = PanelWeight.of(weight, kind, level)
    assert most / 4 < error(form.matmul(even), even.double() @ weight.double().T) < most
    # Of 512 values that share a scale one in 50 is 20 times as large: half a step is 0.2 of the others.
    most_of_large = max(most, 0.026) if level == VectorLevel.AVX512 else most
    assert error(form.matmul(large), large.double() @ weight.double().T) < most_of_large


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_zeros_stay_zeros(kind: str) -> None:
    weight = torch.zeros(20, 64)
    weight[3, 5] = 1.0
    y = make_weight(weight, kind).matmul(torch.ones(2, 64))
    assert torch.count_nonzero(y[:, :3]) == 0 and torch.allclose(y[:, 3], torch.ones(2), atol=1e-3)
    assert torch.count_nonzero(make_weight(weight, kind).matmul(torch.zeros(2, 64))) == 0


@needs_panels
def test_bfloat16_is_left_to_onednn_where_it_has_the_better_instructions() -> None:
    """We ask the CPU, before torch is there; it must agree with what torch finds."""
    is_ours = vector_level() == VectorLevel.AVX512 and (has_tiles() or not torch.cpu._is_amx_tile_supported())
    is_ours = is_ours or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert panel_kind("bfloat16") == ("bfloat16" if is_ours else None)


@at_each_level
def test_int8_sums_do_not_overflow(level: VectorLevel) -> None:
    """The largest values everywhere, over more inputs than 11 bits of x have room for."""
    weight = PanelWeight.of(torch.ones(16, 40_000), "int8", level)
    assert float(weight.matmul(torch.ones(1, 40_000))[0, 0]) == pytest.approx(40_000, rel=1e-3)


@needs_panels
@pytest.mark.parametrize("kind", ["int8", *INT4])
def test_bytes_are_those_that_are_told(kind: str) -> None:
    assert PanelWeight.of(torch.randn(48, 200), kind).packed.nbytes == matrix_bytes(kind, 48, 200)


def test_a_view_with_a_row_stride_is_read_in_place() -> None:
    x, weight = case(6, 64, 32)
    wide = torch.zeros(6, 100)
    wide[:, :64] = x
    form = make_weight(weight.bfloat16(), "int8")
    assert torch.equal(form.matmul(wide[:, :64]), form.matmul(x))


@at_each_level
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_result_wider_than_its_input(kind: str, level: VectorLevel) -> None:
    """Logits are float32 without a rounding on their way."""
    torch.manual_seed(0)
    form, x = PanelWeight.of(torch.randn(50, 70).bfloat16(), kind, level), torch.randn(3, 70).bfloat16()
    wide = form.matmul(x, torch.float32)
    assert wide.dtype == torch.float32 and not torch.equal(wide, wide.bfloat16().float())
    assert torch.equal(wide.bfloat16(), form.matmul(x))
