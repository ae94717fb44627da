"""NaN and infinity: what a kernel makes of them is no number either, in the row that they belong to and in no other."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lepton_dist.kernels.attention import PagedBatch, paged_attention
from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.cpu.native import VectorLevel
from lepton_dist.kernels.linear import DenseWeight, Weight, make_weight
from lepton_dist.kernels.quantized import RoundedWeight
from tests.plain_torch import plain_torch
from tests.unit.kernels.paged import random_batch
from tests.unit.kernels.test_matmul import at_each_level
from tests.unit.kernels.test_paged_attention import use_level

KINDS = ["bfloat16", "int8", "int4", "int4-128"]
OUT, BLOCK = 70, 16
ROWS = [1, 3, 9, 16, 40, 70]  # on either side of the numbers from which the kernels go other ways
PLACES = [0, 37, 511, 519, 300, 514]
DTYPES = 3 * [torch.float32, torch.bfloat16]


def weight_of(in_features: int) -> torch.Tensor:
    return torch.randn(OUT, in_features, generator=torch.Generator().manual_seed(1)).bfloat16() * 0.05


def check_rows(make: Callable[[torch.Tensor], Weight], value: float, in_features: int) -> None:
    """One value of x is no number: its row is none of all, the others keep their bits."""
    form = make(weight_of(in_features))
    for rows, place, dtype in zip(ROWS, PLACES, DTYPES, strict=True):
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
        sound = form.matmul(x)
        assert sound.isfinite().all()
        row = place % rows
        broken = x.clone()
        broken[row, place] = value
        y = form.matmul(broken)
        assert not y[row].isfinite().any(), (rows, place)
        others = torch.arange(rows) != row
        assert torch.equal(y[others], sound[others]), (rows, place)


def check_features(make: Callable[[torch.Tensor], Weight], value: float, in_features: int) -> None:
    """One value of the weight is no number: its output feature is none for all rows, the others keep their bits."""
    weight = weight_of(in_features)
    sound = make(weight)
    for rows, place, feature in zip(ROWS, PLACES, (0, 15, 33, OUT - 1, 31, 16), strict=True):
        broken = weight.clone()
        broken[feature, place] = value
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).abs_()
        y, wanted = make(broken).matmul(x), sound.matmul(x)
        assert not y[:, feature].isfinite().any(), (rows, place)
        others = torch.arange(OUT) != feature
        assert torch.equal(y[:, others], wanted[:, others]), (rows, place)


both = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
widths = pytest.mark.parametrize("in_features", [520, 640], ids=["odd", "whole tiles"])


@at_each_level
@both
@widths
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_x(kind: str, in_features: int, value: float, level: VectorLevel) -> None:
    check_rows(lambda weight: PanelWeight.of(weight, kind, level), value, in_features)


@at_each_level
@both
@widths
@pytest.mark.parametrize("kind", KINDS)
def test_an_output_feature(kind: str, in_features: int, value: float, level: VectorLevel) -> None:
    check_features(lambda weight: PanelWeight.of(weight, kind, level), value, in_features)


class Widened(DenseWeight):
    """A float32 matrix that takes x of any dtype."""

    def matmul(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return super().matmul(x.float(), dtype)


@both
@pytest.mark.parametrize("kind", [None, "int8", "int4", "int4-128"])
def test_without_compiled_kernels(kind: str | None, value: float) -> None:
    def make(weight: torch.Tensor) -> Weight:
        return RoundedWeight(weight, kind) if kind is not None else Widened(weight.float())

    check_rows(make, value, 520)
    check_features(make, value, 520)


def test_torchs_own_product_with_bytes() -> None:
    with plain_torch():
        form = make_weight(weight_of(512), "int8")
        for value in (math.nan, math.inf):
            x = torch.randn(3, 512).bfloat16()
            x[1, 5] = value
            assert form.matmul(x).isfinite().all(dim=1).tolist() == [True, False, True]


SPANS = [(1, 70), (5, 37), (1, 1), (40, 40)]
SHAPES = [(8, 2, 64), (5, 1, 32), (12, 1, 16), (3, 1, 24)]
windows = pytest.mark.parametrize("window", [None, 20])


def paths(levels: list[VectorLevel]) -> pytest.MarkDecorator:
    """The compiled kernels at each level, and torch's."""
    return pytest.mark.parametrize("level", [*levels, None], ids=lambda level: "torch" if level is None else level.name)


def attend(
    level: VectorLevel | None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, int | None], torch.Tensor]:
    if level is not None:
        use_level(level, monkeypatch)

    def run(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int | None
    ) -> torch.Tensor:
        again = PagedBatch(batch.slots, batch.spans, batch.tables)
        with plain_torch() if level is None else nullcontext():
            return paged_attention(query, keys, values, again, window)

    return run


@paths([VectorLevel.AVX2, VectorLevel.AVX512])
@windows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_sequence_does_not_see_does_not_reach_it(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    window: int | None,
    level: VectorLevel | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slots behind its end, and all blocks of others, the first of the arena too, with which tables are padded."""
    run = attend(level, monkeypatch)
    heads, kv_heads, dim = shape
    torch.manual_seed(dim)
    keys, values, batch = random_batch(SPANS, kv_heads, dim, BLOCK, dtype)
    query = torch.randn(sum(count for count, _ in SPANS), heads, dim).to(dtype)
    sound = run(query, keys, values, batch, window)
    assert sound.isfinite().all()
    for row, (start, count, length) in enumerate(batch.spans.tolist()):
        blocks = batch.tables[row, : -(-length // BLOCK)]
        alone = [torch.full_like(arena, math.nan) for arena in (keys, values)]
        for arena, broken in zip((keys, values), alone, strict=True):
            broken[blocks] = arena[blocks]
            if length % BLOCK:
                broken[blocks[-1], :, length % BLOCK :] = math.nan
        found = run(query, *alone, batch, window)
        assert torch.equal(found[start : start + count], sound[start : start + count]), row


@paths([VectorLevel.AVX2, VectorLevel.AVX512])
@windows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("what", ["query", "keys", "values", "first tile of keys"])
def test_what_a_token_sees_reaches_it(
    what: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    window: int | None,
    level: VectorLevel | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = attend(level, monkeypatch)
    heads, kv_heads, dim = shape
    torch.manual_seed(dim)
    keys, values, batch = random_batch(SPANS, kv_heads, dim, BLOCK, dtype)
    query = torch.randn(sum(count for count, _ in SPANS), heads, dim).to(dtype)
    sound = run(query, keys, values, batch, window)
    for row, (start, count, length) in enumerate(batch.spans.tolist()):
        arenas, asked = [keys.clone(), values.clone()], query.clone()
        seen_first = 0 if window is None else max(0, length - count + 1 - window)
        if what == "query":
            asked[start + count - 1] = math.nan
        else:
            broken = arenas[what == "values"]
            last = min(length, seen_first + 32) if what == "first tile of keys" else length - count + 1
            first = seen_first if what == "first tile of keys" else last - 1
            for at in range(first, last):
                channels = slice(None) if what == "values" else slice(3, 4)
                broken[batch.tables[row, at // BLOCK], :, at % BLOCK, channels] = math.nan
        found = run(asked, *arenas, batch, window)
        assert found[start + count - 1 if what == "query" else start].isnan().all(), row
        others = np.r_[0:start, start + count : len(query)]
        assert torch.equal(found[others], sound[others])
