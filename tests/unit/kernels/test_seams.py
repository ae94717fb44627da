"""What Python hands to C: a tensor that a kernel does not take goes the way of torch or is refused."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torch.nn import functional

from lepton_dist.kernels.activations import gated
from lepton_dist.kernels.attention import PagedBatch, paged_attention, write_cache
from lepton_dist.kernels.cpu import native
from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.cpu.native import VectorLevel, native_library
from lepton_dist.kernels.norms import add_rms_norm, rms_norm
from lepton_dist.kernels.rope import rotate
from lepton_dist.kernels.row_maxima import row_maxima
from lepton_dist.runtime.skeleton import decode_batch
from tests.plain_torch import plain_torch
from tests.unit.kernels.paged import random_batch
from tests.unit.kernels.test_matmul import at_each_level, needs_panels
from tests.unit.model.layer import HIDDEN, layer
from tests.unit.model.test_native_layer import run

KINDS = ["bfloat16", "int8", "int4"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    return torch.allclose(found.double(), wanted.double(), rtol=1e-2, atol=1e-2)


@at_each_level
@every_kind
def test_a_product_refuses_what_it_does_not_take(kind: str, level: VectorLevel) -> None:
    form = PanelWeight.of(torch.randn(70, 64).bfloat16(), kind, level)
    for x in (
        torch.randn(3, 32),
        torch.randn(3, 128),
        torch.randn(64),
        torch.randn(2, 3, 64),
        torch.randn(3, 64).double(),
    ):
        with pytest.raises(ValueError, match=r"takes float32 or bfloat16 .* 64"):
            form.matmul(x)
    for other in (torch.randn(3, 64).half(), torch.empty(3, 64, device="meta")):
        with pytest.raises(ValueError, match="it was given"):
            form.matmul(other)
    with pytest.raises(ValueError, match=r"to give torch\.float64"):
        form.matmul(torch.randn(3, 64), torch.float64)


@at_each_level
@every_kind
def test_a_product_of_a_transposed_x(kind: str, level: VectorLevel) -> None:
    form, x = PanelWeight.of(torch.randn(70, 64).bfloat16(), kind, level), torch.randn(64, 9)
    assert torch.equal(form.matmul(x.t()), form.matmul(x.t().contiguous()))
    assert torch.equal(form.matmul(x[:, :1].t().expand(4, 64)), form.matmul(x[:, :1].t().repeat(4, 1)))


@at_each_level
@every_kind
def test_no_rows_in_a_thread_that_has_computed_nothing(kind: str, level: VectorLevel) -> None:
    form = PanelWeight.of(torch.randn(70, 64).bfloat16(), kind, level)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(form.matmul, torch.randn(0, 64)).result().shape == (0, 70)


@needs_panels
def test_panels_are_made_of_matrices_alone() -> None:
    for weight, kind in ((torch.randn(4), "int8"), (torch.randn(4, 4).half(), "int8"), (torch.randn(4, 4), "bfloat16")):
        with pytest.raises(ValueError, match="panels of"):
            PanelWeight.of(weight, kind)
    with pytest.raises(ValueError, match="no elements"):
        PanelWeight.of(torch.randn(4, 0), "int8")
    with pytest.raises(ValueError, match="no whole panels"):
        PanelWeight.of(torch.randn(4, 8), "int8")._panels.pack(0, 5, 0, 0)


def test_norms_of_tensors_of_other_kinds() -> None:
    weight = torch.rand(64)
    bfloat16, strided = torch.randn(5, 64).bfloat16(), torch.randn(64, 5).t()
    delta = torch.randn(5, 64).bfloat16()
    for hidden in (bfloat16, strided, torch.randn(5, 128)[:, ::2]):
        found, wanted = hidden.clone(), hidden.clone()
        if not hidden.is_contiguous():
            found, wanted = (torch.empty_strided(hidden.shape, hidden.stride()).copy_(hidden) for _ in range(2))
        mine = add_rms_norm(found, delta, weight, 1e-5, torch.bfloat16)
        with plain_torch():
            other = add_rms_norm(wanted, delta, weight, 1e-5, torch.bfloat16)
        assert close(mine, other) and close(found, wanted)
    hidden = torch.randn(5, 64)
    assert close(
        rms_norm(hidden, weight.bfloat16().float(), 1e-5, torch.float32),
        rms_norm(hidden, weight.bfloat16(), 1e-5, torch.float32),
    )
    assert close(
        rms_norm(hidden, torch.rand(128)[::2].fill_(1), 1e-5, torch.float32),
        rms_norm(hidden, torch.ones(64), 1e-5, torch.float32),
    )
    assert rms_norm(hidden, weight, 1e-5, torch.float16).dtype == torch.float16
    with pytest.raises((RuntimeError, ValueError)):
        rms_norm(hidden, torch.rand(32), 1e-5, torch.float32)
    with pytest.raises(RuntimeError):
        add_rms_norm(hidden, torch.randn(4, 64), weight, 1e-5, torch.float32)


def test_other_pointwise_kernels_of_tensors_of_other_kinds() -> None:
    scores = torch.randn(3, 300).bfloat16()
    assert row_maxima(scores)[1].tolist() == scores.float().argmax(1).tolist()
    deep = torch.randn(2, 3, 64)
    assert close(gated(deep, functional.silu), gated(deep.view(6, 64), functional.silu).view(2, 3, 32))
    x, angles = torch.randn(4, 2, 16), torch.rand(4, 1, 8)
    wanted = rotate(x.clone(), angles.cos(), angles.sin())
    assert close(rotate(x.clone(), angles.double().cos(), angles.double().sin()), wanted)
    wide = torch.rand(4, 1, 16)
    wide[..., ::2] = angles
    assert close(rotate(x.clone(), wide.cos()[..., ::2], wide.sin()[..., ::2]), wanted)
    assert close(
        rotate(x[:1].expand(4, 2, 16), angles.cos(), angles.sin())[1],
        rotate(x[:1].clone(), *(a[1:2] for a in (angles.cos(), angles.sin())))[0],
    )


def test_a_cache_of_other_kinds() -> None:
    key, value = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    slots = torch.tensor([5, 0, 30])
    wanted = [torch.zeros(8, 2, 4, 16) for _ in range(2)]
    with plain_torch():
        write_cache(*wanted, slots, key, value)
    mixed = [torch.zeros(8, 2, 4, 16), torch.zeros(8, 2, 4, 16).bfloat16()]
    strided = [torch.zeros(8, 4, 2, 16).transpose(1, 2) for _ in range(2)]
    narrow = [torch.zeros(8, 2, 4, 16) for _ in range(2)]
    write_cache(*mixed, slots, key, value)
    write_cache(*strided, slots, key, value)
    write_cache(*narrow, slots.int(), key, value)
    for keys, values in (mixed, strided, narrow):
        assert close(keys, wanted[0]) and close(values.float(), wanted[1])
    for outside in (32, -1):
        with pytest.raises(IndexError):
            write_cache(*narrow, torch.tensor([5, 0, outside]), key, value + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_arenas_and_tables_of_other_kinds(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys, values, batch = random_batch([(1, 30), (5, 40)], 2, 32, 16, dtype)
    query = torch.randn(6, 4, 32).to(dtype)
    wanted = paged_attention(query, keys, values, batch, None)
    strided = [arena.transpose(1, 2).contiguous().transpose(1, 2) for arena in (keys, values)]
    wide = torch.zeros(2, 2 * batch.tables.shape[1], dtype=torch.int64)
    wide[:, ::2] = batch.tables
    for arenas, tables in (
        (strided, batch.tables),
        ((keys, values), batch.tables.int()),
        ((keys, values), wide[:, ::2]),
        ((keys, values.double()), batch.tables),
    ):
        assert close(paged_attention(query, *arenas, PagedBatch(batch.slots, batch.spans, tables), None), wanted)
    assert close(paged_attention(query.transpose(0, 1).contiguous().transpose(0, 1), keys, values, batch, None), wanted)


@needs_panels
def test_a_batch_that_does_not_fit_its_tensors() -> None:
    keys, values, batch = random_batch([(1, 30), (5, 40)], 2, 32, 16, torch.float32)
    query = torch.randn(6, 4, 32)
    for wrong in (
        PagedBatch(batch.slots, batch.spans, batch.tables[:, :1]),
        PagedBatch(batch.slots, batch.spans, batch.tables[:1]),
        PagedBatch(batch.slots, batch.spans, batch.tables + 100),
        PagedBatch(batch.slots, batch.spans, batch.tables - 100),
        PagedBatch(batch.slots, batch.spans + np.array([1, 0, 0]), batch.tables),
        PagedBatch(batch.slots, batch.spans + np.array([0, 40, 0]), batch.tables),
    ):
        with pytest.raises(ValueError, match="fit"):
            paged_attention(query, keys, values, wrong, None)


@needs_panels
def test_a_layer_refuses_what_it_does_not_take() -> None:
    made = layer("bfloat16", torch.bfloat16)
    assert made.native is not None
    hidden = torch.randn(3, HIDDEN)
    for wrong, delta in (
        (hidden, torch.randn(3, HIDDEN)),
        (hidden, torch.randn(2, HIDDEN).bfloat16()),
        (hidden.bfloat16(), torch.randn(3, HIDDEN).bfloat16()),
        (torch.randn(HIDDEN, 3).t(), torch.randn(3, HIDDEN).bfloat16()),
        (torch.randn(3, 2 * HIDDEN), torch.randn(3, 2 * HIDDEN).bfloat16()),
    ):
        with pytest.raises(ValueError, match="a layer of"):
            made.native.mlp(wrong, delta)
    arenas = torch.randn(8, 2, 16, 32), torch.randn(8, 2, 16, 32)
    assert made.native.can_enter(arenas)
    for others in (
        (arenas[0], arenas[1].bfloat16()),
        (arenas[0][:, :1], arenas[1][:, :1]),
        (arenas[0].transpose(1, 2).contiguous().transpose(1, 2), arenas[1]),
        (arenas[0].double(), arenas[1].double()),
    ):
        assert not made.native.can_enter(others)


@at_each_level
@every_kind
def test_threads_share_a_weight(kind: str, level: VectorLevel) -> None:
    form = PanelWeight.of(torch.randn(96, 640).bfloat16(), kind, level)
    inputs = [torch.randn(rows, 640).bfloat16() for rows in (1, 3, 8, 40)]
    wanted = [form.matmul(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda number: form.matmul(inputs[number % 4]), range(600)))
    assert all(torch.equal(result, wanted[number % 4]) for number, result in enumerate(results))


@needs_panels
def test_threads_share_a_layer() -> None:
    made, batches = layer("bfloat16", torch.bfloat16), [decode_batch(1, 30), decode_batch(5, 47)]
    assert made.native is not None
    torch.manual_seed(1)

    def steps(number: int) -> list[torch.Tensor]:
        native_layer, rows = made.native, number % 7 + 1
        assert native_layer is not None
        generator = torch.Generator().manual_seed(rows)
        hidden, delta = torch.randn(rows, HIDDEN, generator=generator), torch.randn(rows, HIDDEN, generator=generator)
        return [native_layer.mlp(hidden, delta.bfloat16()), hidden]

    wanted = [steps(number) for number in range(7)]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(steps, range(300))):
            assert all(torch.equal(*pair) for pair in zip(found, wanted[number % 7], strict=True))
    assert all(run(made, batch, torch.bfloat16, True)[0].isfinite().all() for batch in batches)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@needs_panels
def test_a_thread_leaves_no_memory_behind() -> None:
    form, x = PanelWeight.of(torch.randn(64, 8192), "int8"), torch.randn(516, 8192)  # some 4 to 8 MiB a thread

    def once() -> None:
        thread = Thread(target=form.matmul, args=(x,))
        thread.start()
        thread.join()

    for _ in range(5):
        once()
    before = resident_bytes()
    for _ in range(25):
        once()
    assert resident_bytes() - before < 40 << 20


@needs_panels
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.expected()
    for wrong, word in ((right[0] + 1, "number"), (right[0], "bytes")):
        monkeypatch.setattr(native, "expected", lambda: [wrong, *right[1:-1], right[-1] + (wrong == right[0]) * 8])  # noqa: B023
        library, problem = native._loaded.__wrapped__()
        assert library is None and word in problem and "launch/environment" in problem
    assert "no number" in native._mismatch(ctypes.CDLL(ctypes.util.find_library("m")))


def test_a_bias_or_a_norm_that_is_none() -> None:
    """A layer whose norm holds a NaN gives none: in two compiled calls as by the kernels one by one."""
    for kind in KINDS:
        if native_library() is None:
            pytest.skip("no compiled kernels")
        made = layer(kind, torch.bfloat16)
        broken = made.attention_norm.weight.clone()
        made.attention_norm.weight[3] = math.nan
        for form in (made, replace(made, native=None)):
            assert run(form, decode_batch(2, 30), torch.bfloat16, True)[0].isnan().all()
        made.attention_norm.weight.copy_(broken)
