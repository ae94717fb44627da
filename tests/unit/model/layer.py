"""A small layer of the Llama kind with random weights."""

from __future__ import annotations

import torch

from lepton_dist.kernels.activations import ACTIVATIONS
from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.linear import make_weight
from lepton_dist.model.decoder_layer import DecoderLayer, make_layer
from lepton_dist.model.layers import Attention, Linear, Mlp, Norm

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, BLOCK_TOKENS = 96, 6, 2, 32, 160, 16


def linear(out_features: int, in_features: int, kind: str, bias: bool = False) -> Linear:
    weight = torch.randn(out_features, in_features) / in_features**0.5
    held = make_weight(weight) if kind == "float32" else PanelWeight.of(weight.bfloat16(), kind)
    return Linear(held, torch.randn(out_features).bfloat16() if bias else None, lambda x: x)


def layer(
    kind: str,
    dtype: torch.dtype,
    *,
    window: int | None = None,
    bias: bool = False,
    rotated: int = 32,
    has_head_norms: bool = False,
) -> DecoderLayer:
    torch.manual_seed(0)
    norms = [Norm(torch.rand(HIDDEN) + 0.5, None, 1e-5, dtype) for _ in range(2)]
    attention = Attention(
        qkv=linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, kind, bias),
        q_norm=Norm(torch.rand(HEAD_DIM) + 0.5, None, 1e-6, dtype) if has_head_norms else None,
        k_norm=Norm(torch.rand(HEAD_DIM) + 0.5, None, 1e-6, dtype) if has_head_norms else None,
        output=linear(HIDDEN, HEADS * HEAD_DIM, kind, bias),
        head_dim=HEAD_DIM,
        window=window,
    )
    mlp = Mlp(linear(2 * FFN, HIDDEN, kind, bias), linear(HIDDEN, FFN, kind, bias), ACTIVATIONS["silu"], is_gated=True)
    return make_layer(norms[0], attention, norms[1], mlp, rotated)
