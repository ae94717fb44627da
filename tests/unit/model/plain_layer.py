"""A small layer of the Llama kind with random weights that are plain matrices, as on a GPU."""

from __future__ import annotations

from importlib import import_module

import torch

from lepton_dist.kernels.activations import ACTIVATIONS
from lepton_dist.kernels.linear import DenseWeight
from lepton_dist.model.decoder_layer import DecoderLayer
from lepton_dist.model.fused_layer import FusedLayer
from lepton_dist.model.layers import Attention, Linear, Mlp, Norm, Reduce, unreduced

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 80, 6, 2, 16, 50


def random_layer(dtype: torch.dtype, device: torch.device, reduce: Reduce = unreduced) -> DecoderLayer:
    """Without any other form than that of torch; the sums of its halves are what `reduce` gives."""

    def linear(out: int, dim: int, reduce: Reduce = unreduced) -> Linear:
        weight = torch.randn(out, dim) / dim**0.5
        return Linear(DenseWeight(weight.to(device, dtype)), None, reduce)

    norms = [Norm((torch.rand(HIDDEN) + 0.5).to(device), None, 1e-5, dtype) for _ in range(2)]
    attention = Attention(
        qkv=linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        q_norm=None,
        k_norm=None,
        output=linear(HIDDEN, HEADS * HEAD_DIM, reduce),
        head_dim=HEAD_DIM,
        window=20,
    )
    mlp = Mlp(linear(2 * FFN, HIDDEN), linear(HIDDEN, FFN, reduce), ACTIVATIONS["silu"], is_gated=True)
    return DecoderLayer(norms[0], attention, norms[1], mlp)


def for_few_tokens(layer: DecoderLayer) -> FusedLayer:
    """Its form for few tokens, wherever it lies: under Triton's interpreter that is the CPU."""
    linears = {"qkv": layer.attention.qkv, "output": layer.attention.output, "up": layer.mlp.up, "down": layer.mlp.down}
    matrices = {}
    for name, linear in linears.items():
        assert isinstance(linear.weight, DenseWeight)
        matrices[name] = linear.weight.matrix
    products = import_module("lepton_dist.kernels.cuda.products")
    return FusedLayer(products, matrices, layer.attention_norm, layer.attention, layer.mlp_norm, layer.mlp)
