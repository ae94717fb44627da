"""A layer in two compiled calls gives the bits of the same layer, kernel by kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from lepton_dist.engine.batch import RunBatch
from lepton_dist.engine.kv_cache import CachedAttention, KvCache, lay_out
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.model.decoder_layer import DecoderLayer, make_layer
from lepton_dist.runtime.skeleton import decode_batch, prefill_batch
from tests.plain_torch import plain_torch
from tests.unit.model.layer import BLOCK_TOKENS, HEAD_DIM, HIDDEN, KV_HEADS, layer

pytestmark = pytest.mark.skipif(native_library() is None, reason="the compiled kernels were not built")


def run(made: DecoderLayer, batch: RunBatch, cache_dtype: torch.dtype, with_delta: bool) -> tuple[torch.Tensor, ...]:
    """The layer's delta, the residual stream, and the cache, of inputs that are always the same."""
    torch.manual_seed(1)
    cache = KvCache(KvGeometry(1, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, cache_dtype), 40)
    layout = lay_out(batch, BLOCK_TOKENS)
    keys, values = cache.arenas(0)
    keys.normal_(), values.normal_()
    hidden = torch.randn(batch.num_tokens, HIDDEN)
    dtype = made.attention_norm.dtype
    delta = torch.randn(batch.num_tokens, HIDDEN).to(dtype) if with_delta else None
    half = torch.rand(batch.num_tokens, 1, HEAD_DIM // 2) * 6
    attend = CachedAttention(cache, layout.paged(torch.device("cpu")))
    result = made(hidden, delta, (half.cos(), half.sin()), 0, attend)
    return result, hidden, keys, values


FAMILIES = {"llama": {}, "qwen2": {"bias": True}, "qwen3": {"has_head_norms": True}}
BATCHES = [decode_batch(1, 30), decode_batch(5, 47), prefill_batch(70)]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("batch", BATCHES, ids=["1", "5", "prompt"])
@pytest.mark.parametrize(
    ("kind", "dtype", "cache_dtype", "window"),
    [
        ("bfloat16", torch.bfloat16, torch.bfloat16, None),
        ("bfloat16", torch.bfloat16, torch.float32, 20),
        ("int8", torch.bfloat16, torch.bfloat16, None),
        ("int4", torch.float32, torch.bfloat16, None),
    ],
)
def test_the_bits_are_those_of_the_kernels_one_by_one(
    kind: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    window: int | None,
    batch: RunBatch,
    with_delta: bool,
    family: str,
) -> None:
    made = layer(kind, dtype, window=window, **FAMILIES[family])
    assert made.native is not None
    whole = run(made, batch, cache_dtype, with_delta)
    parts = run(replace(made, native=None), batch, cache_dtype, with_delta)
    for mine, wanted in zip(whole, parts, strict=True):
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted)
    assert whole[0].float().abs().max() > 0.1, "nothing was computed"


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("batch", BATCHES, ids=["1", "5", "prompt"])
def test_the_values_are_those_of_torch(batch: RunBatch, family: str) -> None:
    """float32 activations, so that only the kernels' own rounding of x, to bfloat16 or less, lies between the two."""
    made = layer("bfloat16", torch.float32, **FAMILIES[family])
    assert made.native is not None
    whole = run(made, batch, torch.float32, True)
    plain = replace(made, native=None)
    with plain_torch():
        for linear in (plain.attention.qkv, plain.attention.output, plain.mlp.up, plain.mlp.down):
            assert linear.bias is None or linear.bias.abs().max() > 0.1
        parts = run(plain, batch, torch.float32, True)
    for mine, wanted in zip(whole, parts, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-2, atol=1e-2)


def test_layers_of_another_kind_are_left_to_the_kernels_one_by_one() -> None:
    assert layer("float32", torch.float32).native is None, "torch's own matrices are not ours to multiply"
    assert layer("bfloat16", torch.bfloat16, rotated=0).native is None
    made = layer("bfloat16", torch.bfloat16)
    for other in ({"activation": functional.gelu}, {"is_gated": False}):
        mlp = replace(made.mlp, **other)
        assert make_layer(made.attention_norm, made.attention, made.mlp_norm, mlp, 32).native is None
    with_bias = replace(made.mlp_norm, bias=torch.zeros(HIDDEN))
    assert make_layer(made.attention_norm, made.attention, with_bias, made.mlp, 32).native is None
