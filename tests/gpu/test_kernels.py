"""The Triton kernels and the torch path of a GPU against the torch path of the CPU, on the same values."""

from __future__ import annotations

import itertools
from importlib import import_module
from types import ModuleType

import pytest
import torch

from lepton_dist.engine.kv_cache import CachedAttention, KvCache, lay_out
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.kernels import attention
from lepton_dist.kernels.attention import PagedBatch, enter_cache, paged_attention
from lepton_dist.kernels.cuda.library import triton_problem
from lepton_dist.kernels.noise import gumbel
from lepton_dist.kernels.norms import rms_norm
from lepton_dist.model.decoder_layer import make_layer
from lepton_dist.runtime.skeleton import decode_batch
from tests.unit.kernels.paged import random_batch
from tests.unit.model.plain_layer import HEAD_DIM, HIDDEN, KV_HEADS, random_layer

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(6, 2, 16, 8), (7, 1, 12, 16), (5, 5, 80, 5), (8, 2, 128, 16), (32, 8, 128, 16)]


@pytest.fixture
def fused() -> ModuleType:
    problem = triton_problem()
    assert not problem, f"the Triton kernels do not work on this GPU: {problem}"
    from lepton_dist.kernels.cuda import fused

    return fused


@pytest.fixture
def products(fused: ModuleType) -> ModuleType:
    torch.manual_seed(7)
    return import_module("lepton_dist.kernels.cuda.products")


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, least: float = 0.0) -> None:
    assert found.is_cuda and found.dtype == dtype and found.shape == expected.shape
    tolerance = max(TOLERANCE[dtype], least)
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=tolerance, atol=tolerance)


def on_gpu(batch: PagedBatch) -> PagedBatch:
    return PagedBatch(batch.slots.cuda(), batch.spans, batch.tables.cuda())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [60, 1000, 4096, 16384])
def test_residual_and_norm(fused: ModuleType, dtype: torch.dtype, dim: int) -> None:
    hidden, weight, delta = torch.randn(9, dim), torch.rand(dim) + 0.5, torch.randn(9, dim).to(dtype)
    mine = hidden.cuda()
    found = fused.add_rms_norm(mine, delta.cuda(), weight.cuda(), 1e-5, dtype)
    expected = hidden + delta.float()
    assert torch.equal(mine.cpu(), expected)
    close(found, rms_norm(expected, weight, 1e-5, torch.float32), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gated_silu(fused: ModuleType, dtype: torch.dtype) -> None:
    x = torch.randn(5, 2 * 14336).to(dtype)
    gate, up = x.float().chunk(2, dim=1)
    close(fused.gated_silu(x.cuda()), torch.nn.functional.silu(gate) * up, dtype)


@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(TOLERANCE, SHAPES)))
def test_entering_the_cache(fused: ModuleType, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    heads, kv_heads, dim, block = shape
    tokens = 37
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype)
    angles = torch.randn(tokens, 1, dim // 2), torch.randn(tokens, 1, dim // 2)
    slots = torch.randperm(10 * block)[:tokens] if 10 * block >= tokens else torch.arange(tokens)
    blocks = -(-int(slots.max() + 1) // block)
    arenas = [torch.zeros(blocks, kv_heads, block, dim).to(dtype) for _ in range(2)]
    mine = [arena.cuda() for arena in arenas]
    device_qkv = qkv.cuda()
    turned, value = device_qkv[:, : heads + kv_heads], device_qkv[:, heads + kv_heads :]
    query = fused.enter_cache(turned, value, tuple(a.cuda() for a in angles), *mine, slots.cuda())
    expected = enter_cache(qkv[:, : heads + kv_heads].clone(), qkv[:, heads + kv_heads :], angles, *arenas, slots)
    close(query, expected, dtype)
    close(mine[0], arenas[0], dtype)
    assert torch.equal(mine[1].cpu(), arenas[1])


@pytest.mark.parametrize("window", [None, 9, 700])
@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(TOLERANCE, SHAPES)))
def test_a_mixed_batch_through_both_attentions(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int, int, int], window: int | None
) -> None:
    """Decodes of many lengths, a whole prompt and a chunk; with Triton, and with torch alone."""
    heads, kv_heads, dim, block = shape
    spans = [(1, 1), (1, 64), (17, 17), (1, 1500), (30, 200), (1, 333)]
    keys, values, batch = random_batch(spans, kv_heads, dim, block, dtype)
    query = torch.randn(sum(count for count, _ in spans), heads, dim).to(dtype)
    expected = paged_attention(query.float(), keys.float(), values.float(), batch, window)
    device_query, device_keys, device_values = query.cuda(), keys.cuda(), values.cuda()
    close(paged_attention(device_query, device_keys, device_values, on_gpu(batch), window), expected, dtype)
    monkeypatch.setattr(attention, "fused_kernels_for", lambda *tensors: None)
    close(paged_attention(device_query, device_keys, device_values, on_gpu(batch), window), expected, dtype)


def test_the_noise_is_the_same_on_both_devices() -> None:
    keys, tokens = torch.randint(-(2**31), 2**31 - 1, (7, 2), dtype=torch.int32), torch.arange(5000, dtype=torch.int32)
    torch.testing.assert_close(gumbel(keys.cuda(), tokens.cuda()).cpu(), gumbel(keys, tokens), rtol=1e-6, atol=1e-6)


# Tokens, channels that are summed over, channels that come out (of the gated product, half as many): Llama 3 8B's among
# them. Sums of so many products differ by their order.
PRODUCTS = [(1, 60, 10), (2, 93, 26), (1, 4096, 4096), (2, 4096, 6144), (2, 14336, 4096), (1, 14336, 512)]
SUM_TOLERANCE = 3e-5


def random_matrix(out: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(out, dim, device="cuda") / dim**0.5).to(dtype)


@pytest.mark.parametrize(("dtype", "sizes"), list(itertools.product(TOLERANCE, PRODUCTS)))
def test_a_product_that_is_added(products: ModuleType, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    tokens, dim, out = sizes
    hidden, x, weight = torch.randn(tokens, out), torch.randn(tokens, dim).to(dtype), random_matrix(out, dim, dtype)
    expected = hidden.double() + x.double() @ weight.double().cpu().T
    found = [hidden.cuda() for _ in range(2)]
    for mine in found:
        products.add_product(mine, x.cuda(), weight)
    assert torch.equal(*found), "two runs differ"
    close(found[0].to(dtype), expected, dtype, SUM_TOLERANCE)


@pytest.mark.parametrize(("dtype", "sizes"), list(itertools.product(TOLERANCE, PRODUCTS)))
def test_a_gated_product(products: ModuleType, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    tokens, dim, out = sizes
    hidden, gain, weight = torch.randn(tokens, dim) * 5, torch.rand(dim) + 0.5, random_matrix(out, dim, dtype)
    normed = rms_norm(hidden, gain, 1e-5, torch.float32)
    gate, up = (normed.double() @ weight.double().cpu().T).chunk(2, dim=1)
    found = [products.gated_product(hidden.cuda(), gain.cuda(), 1e-5, weight) for _ in range(2)]
    assert torch.equal(*found), "two runs differ"
    close(found[0], torch.nn.functional.silu(gate) * up, dtype, SUM_TOLERANCE)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(TOLERANCE, [SHAPES[0], SHAPES[-1]])))
def test_a_product_that_enters_the_cache(
    products: ModuleType, dtype: torch.dtype, shape: tuple[int, int, int, int], tokens: int
) -> None:
    heads, kv_heads, dim, block = shape
    hidden, gain = torch.randn(tokens, 4096) * 5, torch.rand(4096) + 0.5
    weight = random_matrix((heads + 2 * kv_heads) * dim, 4096, dtype)
    turn = torch.randn(tokens, 1, dim // 2) * 3
    angles = turn.cos(), turn.sin()
    slots = torch.tensor([17, 3])[:tokens]
    arenas = [torch.zeros(8, kv_heads, block, dim).to(dtype) for _ in range(2)]
    mine = [arena.cuda() for arena in arenas]
    turning = tuple(table.cuda() for table in angles)
    query = products.enter_product(hidden.cuda(), gain.cuda(), 1e-5, weight, turning, *mine, slots.cuda())
    qkv = rms_norm(hidden, gain, 1e-5, torch.float32).double() @ weight.double().cpu().T
    qkv = qkv.to(dtype).view(tokens, heads + 2 * kv_heads, dim)
    expected = enter_cache(qkv[:, : heads + kv_heads].clone(), qkv[:, heads + kv_heads :], angles, *arenas, slots)
    for found, wanted in zip((query, *mine), (expected, *arenas), strict=True):
        # A product between two numbers of the dtype may be rounded to the other one before it turns.
        close(found, wanted, dtype, max(2 * TOLERANCE[dtype], SUM_TOLERANCE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2])
def test_a_layer_for_few_tokens(products: ModuleType, dtype: torch.dtype, count: int) -> None:
    device = torch.device("cuda")
    plain = random_layer(dtype, device)
    made = make_layer(plain.attention_norm, plain.attention, plain.mlp_norm, plain.mlp, HEAD_DIM)
    assert made.fused is not None
    batch = lay_out(decode_batch(count, 30), 16).paged(device)
    results = []
    for layer in (plain, made):
        torch.manual_seed(1)
        cache = KvCache(KvGeometry(1, KV_HEADS, HEAD_DIM, 16, dtype), 2 * count, device)
        for arena in cache.arenas(0):
            arena.normal_()
        hidden, delta = torch.randn(count, HIDDEN, device=device), torch.randn(count, HIDDEN, device=device).to(dtype)
        angles = torch.randn(count, 1, HEAD_DIM // 2, device=device)
        added = layer(hidden, delta, (angles.cos(), angles.sin()), 0, CachedAttention(cache, batch))
        assert (added is None) == (layer is made)
        results.append((hidden if added is None else hidden + added, *cache.arenas(0)))
    for found, expected in zip(results[1], results[0], strict=True):
        close(found.to(dtype), expected.cpu(), dtype, 2 * TOLERANCE[dtype])
