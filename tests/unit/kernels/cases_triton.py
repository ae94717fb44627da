"""The GPU kernels against the torch path, under Triton's own interpreter: no GPU, and the same source."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from lepton_dist.engine.kv_cache import CachedAttention, KvCache, lay_out
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.kernels.attention import PagedBatch, enter_cache, paged_attention
from lepton_dist.kernels.cuda import fused, products
from lepton_dist.kernels.norms import rms_norm
from lepton_dist.model import fused_layer
from lepton_dist.model.decoder_layer import DecoderLayer, make_layer
from lepton_dist.model.layers import unreduced
from lepton_dist.runtime.skeleton import decode_batch, prefill_batch
from tests.unit.kernels.paged import random_batch
from tests.unit.model.plain_layer import for_few_tokens, random_layer

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = [torch.float32, torch.bfloat16]
# Triton 3.9's interpreter multiplies the bits of bfloat16 as if they were whole numbers: its tl.dot has no such type.
DOT_DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "dim", "has_delta"), list(itertools.product(DTYPES, (60, 128, 1000), (True, False))))
def test_residual_and_norm(dtype: torch.dtype, dim: int, has_delta: bool) -> None:
    hidden, weight = torch.randn(3, dim) * 5, torch.rand(dim) + 0.5
    delta = torch.randn(3, dim).to(dtype) if has_delta else None
    expected = hidden + (0 if delta is None else delta.float())
    found = fused.add_rms_norm(hidden, delta, weight, 1e-5, dtype)
    assert torch.equal(hidden, expected)
    close(found, rms_norm(expected, weight, 1e-5, torch.float32), dtype)


@pytest.mark.parametrize(("dtype", "ffn"), list(itertools.product(DTYPES, (93, 1024, 1500))))
def test_gated_silu(dtype: torch.dtype, ffn: int) -> None:
    x = torch.randn(3, 2 * ffn).to(dtype)
    x[0, :2] = torch.tensor([-90.0, 90.0])  # where exp overflows
    gate, up = x.float().chunk(2, dim=1)
    close(fused.gated_silu(x), torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "half"),
    [(6, 2, 16, 8), (9, 3, 8, 3), (5, 5, 12, 0), (32, 8, 128, 64)],  # even, partial rotation, none, Llama 3's
)
def test_entering_the_cache(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, half: int) -> None:
    tokens, block = 5, 4
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype)
    turned, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    angles = (torch.randn(tokens, 1, half), torch.randn(tokens, 1, half)) if half else None
    slots = torch.tensor([3, 17, 0, 8, 30])
    arenas = [torch.zeros(8, kv_heads, block, dim).to(dtype) for _ in range(4)]
    before = qkv.clone()
    query = fused.enter_cache(turned, value, angles, arenas[0], arenas[1], slots)
    assert torch.equal(qkv, before)
    expected = enter_cache(turned.clone(), value, angles, arenas[2], arenas[3], slots)
    close(query, expected, dtype)
    close(arenas[0], arenas[2], dtype)
    assert torch.equal(arenas[1], arenas[3])


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block"), [(6, 2, 16, 8), (7, 1, 12, 16), (5, 5, 80, 5), (8, 2, 128, 16)]
)
def test_decode_attention(
    dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, dim: int, block: int
) -> None:
    lengths = [1, 63, 64, 65, 200]
    keys, values, batch = random_batch([(1, length) for length in lengths], kv_heads, dim, block, dtype)
    query = torch.randn(len(lengths), heads, dim).to(dtype)
    expected = paged_attention(query, keys, values, batch, window)
    found = fused.paged_decode(query, keys, values, batch.tables, torch.tensor(lengths), window)
    close(found, expected, dtype)


def test_decode_attention_is_zero_for_padding_and_splits_long_contexts() -> None:
    lengths = [700, 3]
    keys, values, batch = random_batch([(1, length) for length in lengths], 1, 16, 16, torch.float32)
    assert fused.num_splits(3, batch.tables.shape[1] * 16) > 1
    query = torch.randn(3, 2, 16)
    tables = torch.cat([batch.tables, torch.zeros_like(batch.tables[:1])]).to(torch.int32)
    found = fused.paged_decode(query, keys, values, tables, torch.tensor([*lengths, 0], dtype=torch.int32), None)
    assert torch.equal(found[2], torch.zeros(2, 16))
    close(found[:2], paged_attention(query[:2], keys, values, batch, None), torch.float32)


@pytest.mark.parametrize("what", ["query", "keys", "values"])
def test_what_is_no_number_stays_none_and_with_its_sequence(what: str) -> None:
    """In one part of a context that is split, and in slots that no sequence sees."""
    keys, values, batch = random_batch([(1, 300), (1, 40)], 2, 32, 16, torch.float32)
    query = torch.randn(2, 4, 32)
    sound = paged_attention(query, keys, values, batch, None)
    keys[int(batch.tables[1, 2]), :, 8:] = values[int(batch.tables[1, 2]), :, 8:] = math.nan
    {"query": query, "keys": keys, "values": values}[what][0 if what == "query" else int(batch.tables[0, 5])] = math.nan
    found = fused.paged_decode(query, keys, values, batch.tables, torch.tensor([300, 40]), None)
    assert found[0].isnan().all() and torch.allclose(found[1], sound[1], atol=1e-5)


def test_a_batch_of_decodes_made_for_a_graph_is_the_same_batch() -> None:
    lengths = [5, 40]
    # A dim that the compiled CPU kernel, which wants the lengths on the host, does not take.
    keys, values, batch = random_batch([(1, length) for length in lengths], 2, 12, 8, torch.float32)
    query = torch.randn(2, 4, 12)
    static = PagedBatch.of_decodes(batch.slots, batch.tables, torch.tensor(lengths))
    found, expected = (paged_attention(query, keys, values, which, None) for which in (static, batch))
    close(found, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim", "out"), [(1, 60, 10), (1, 1100, 5), (2, 512, 13), (2, 93, 17)])
def test_a_product_that_is_added(dtype: torch.dtype, tokens: int, dim: int, out: int) -> None:
    hidden, x = torch.randn(tokens, out), torch.randn(tokens, dim).to(dtype)
    weight = (torch.randn(out, dim) / dim**0.5).to(dtype)
    expected = hidden + x.float() @ weight.float().T
    products.add_product(hidden, x, weight)
    close(hidden.to(dtype), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim", "ffn"), [(1, 60, 10), (1, 600, 5), (2, 256, 13), (2, 93, 17)])
def test_a_gated_product(dtype: torch.dtype, tokens: int, dim: int, ffn: int) -> None:
    hidden, gain = torch.randn(tokens, dim) * 5, torch.rand(dim) + 0.5
    weight = (torch.randn(2 * ffn, dim) / dim**0.5).to(dtype)
    gate, up = (rms_norm(hidden, gain, 1e-5, torch.float32) @ weight.float().T).chunk(2, dim=1)
    close(products.gated_product(hidden, gain, 1e-5, weight), torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "half"), [(6, 2, 16, 8), (9, 3, 8, 3), (5, 5, 12, 0)])
def test_a_product_that_enters_the_cache(
    dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int, half: int
) -> None:
    hidden, gain = torch.randn(tokens, 260) * 5, torch.rand(260) + 0.5
    weight = (torch.randn((heads + 2 * kv_heads) * dim, 260) / 260**0.5).to(dtype)
    angles = (torch.randn(tokens, 1, half), torch.randn(tokens, 1, half)) if half else None
    slots = torch.tensor([17, 3])[:tokens]
    arenas = [torch.zeros(8, kv_heads, 4, dim).to(dtype) for _ in range(4)]
    query = products.enter_product(hidden, gain, 1e-5, weight, angles, arenas[0], arenas[1], slots)
    qkv = rms_norm(hidden, gain, 1e-5, torch.float32) @ weight.float().T
    qkv = qkv.to(dtype).view(tokens, heads + 2 * kv_heads, dim)
    turned, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    close(query, enter_cache(turned.clone(), value, angles, arenas[2], arenas[3], slots), dtype)
    close(arenas[0], arenas[2], dtype)
    close(arenas[1], arenas[3], dtype)


@pytest.mark.parametrize("is_sharded", [True, False])
def test_a_layer_for_few_tokens(is_sharded: bool) -> None:
    plain = random_layer(torch.float32, torch.device("cpu"), (lambda x: x.mul_(2)) if is_sharded else unreduced)
    layer = replace(plain, fused=for_few_tokens(plain))
    batch = decode_batch(2, 30)
    results = []
    for which in (plain, layer):
        torch.manual_seed(1)
        cache = KvCache(KvGeometry(1, 2, 16, 16, torch.float32), 6)
        for arena in cache.arenas(0):
            arena.normal_()
        hidden, delta, angles = torch.randn(2, 80), torch.randn(2, 80), torch.randn(2, 1, 8)
        attend = CachedAttention(cache, lay_out(batch, 16).paged(torch.device("cpu")))
        added = which(hidden, delta, (angles.cos(), angles.sin()), 0, attend)
        assert (added is None) == (which is layer)
        results.append((hidden if added is None else hidden + added, *cache.arenas(0)))
    for found, expected in zip(results[1], results[0], strict=True):
        close(found, expected, torch.float32)


def test_what_a_layer_for_few_tokens_leaves_to_the_other() -> None:
    plain = random_layer(torch.bfloat16, torch.device("cpu"))
    few = for_few_tokens(plain)
    for batch, expected in ((decode_batch(2, 9), True), (decode_batch(3, 9), False), (prefill_batch(2), False)):
        paged = lay_out(batch, 16).paged(torch.device("cpu"))
        assert few.can_run(torch.zeros(batch.num_tokens, 80), paged) == expected


def test_which_layers_have_a_form_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layer, "fused_kernels_for", lambda *tensors: products)
    plain = random_layer(torch.bfloat16, torch.device("cpu"))

    def has_form(layer: DecoderLayer) -> bool:
        return make_layer(layer.attention_norm, layer.attention, layer.mlp_norm, layer.mlp, 16).fused is not None

    assert has_form(plain)
    summed = replace(plain.mlp.down, reduce=lambda x: x, bias=torch.zeros(80))
    assert has_form(replace(plain, mlp=replace(plain.mlp, down=summed))), "a sum and a bias come behind the product"
    assert not has_form(random_layer(torch.float32, torch.device("cpu")))
    biased = replace(plain.attention.qkv, bias=torch.zeros(160))
    for other in (
        replace(plain, mlp=replace(plain.mlp, is_gated=False)),
        replace(plain, mlp=replace(plain.mlp, activation=torch.nn.functional.gelu)),
        replace(plain, mlp_norm=replace(plain.mlp_norm, bias=torch.zeros(80))),
        replace(plain, attention=replace(plain.attention, qkv=biased)),
        replace(plain, attention=replace(plain.attention, q_norm=plain.mlp_norm, k_norm=plain.mlp_norm)),
    ):
        assert not has_form(other)
