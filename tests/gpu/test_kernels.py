"""The Triton kernels and the torch path of a GPU against the torch path of the CPU, on the same values."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch

from lepton_dist.kernels import attention
from lepton_dist.kernels.attention import PagedBatch, enter_cache, paged_attention
from lepton_dist.kernels.cuda.library import triton_problem
from lepton_dist.kernels.noise import gumbel
from lepton_dist.kernels.norms import rms_norm
from tests.unit.kernels.paged import random_batch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(6, 2, 16, 8), (7, 1, 12, 16), (5, 5, 80, 5), (8, 2, 128, 16), (32, 8, 128, 16)]


@pytest.fixture
def fused() -> ModuleType:
    problem = triton_problem()
    assert not problem, f"the Triton kernels do not work on this GPU: {problem}"
    from lepton_dist.kernels.cuda import fused

    return fused


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.is_cuda and found.dtype == dtype and found.shape == expected.shape
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


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
