"""Layers of the Llama kind on a GPU, for few tokens: six launches, each of the four products with what lies around it.

A step of few tokens waits for weights, so what it must not wait for is anything else: see `kernels.cuda.products`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch.nn import functional

from lepton_dist.kernels.attention import PagedBatch, paged_attention
from lepton_dist.kernels.cuda.library import fused_kernels_for
from lepton_dist.kernels.gradients import needs_gradient
from lepton_dist.kernels.linear import DenseWeight
from lepton_dist.model.layers import Angles, Attention, Linear, Mlp, Norm

_DTYPES = (torch.bfloat16, torch.float16)
_MATRICES = ("qkv", "output", "up", "down")


@dataclass(frozen=True)
class FusedLayer:
    """A layer and its `matrices` [out, in], one for each of qkv, output, up and down; `products` are the kernels."""

    products: ModuleType
    matrices: dict[str, torch.Tensor]
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp

    def can_run(self, hidden: torch.Tensor, batch: PagedBatch) -> bool:
        """Whether these are few tokens, each of a sequence of its own."""
        if hidden.shape[0] > self.products.MOST_TOKENS or not hidden.is_contiguous() or needs_gradient(hidden):
            return False
        decodes = batch.decodes
        return decodes is not None and decodes.rows is None

    def __call__(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        angles: Angles | None,
        arenas: tuple[torch.Tensor, torch.Tensor],
        batch: PagedBatch,
    ) -> None:
        """hidden float32 [tokens, hidden] += delta of the layer before, and then what this layer adds, in place."""
        if delta is not None:
            hidden += delta
        norm = self.attention_norm
        query = self.products.enter_product(
            hidden, norm.weight, norm.eps, self.matrices["qkv"], angles, *arenas, batch.slots
        )
        mixed = paged_attention(query, *arenas, batch, self.attention.window).flatten(1)
        self._add(hidden, mixed, "output", self.attention.output)
        norm = self.mlp_norm
        inner = self.products.gated_product(hidden, norm.weight, norm.eps, self.matrices["up"])
        self._add(hidden, inner, "down", self.mlp.down)

    def _add(self, hidden: torch.Tensor, x: torch.Tensor, name: str, linear: Linear) -> None:
        """A sum over ranks comes between product and residual."""
        if linear.is_product:
            self.products.add_product(hidden, x, self.matrices[name])
        else:
            hidden += linear(x)


def fused_layer(attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: Mlp) -> FusedLayer | None:
    """The layer of few launches; None where it is of another kind, or not on a GPU where the kernels work."""
    linears = dict(zip(_MATRICES, (attention.qkv, attention.output, mlp.up, mlp.down), strict=True))
    matrices = {
        name: linear.weight.matrix for name, linear in linears.items() if isinstance(linear.weight, DenseWeight)
    }
    if len(matrices) < len(linears) or not (attention.qkv.is_product and mlp.up.is_product):
        return None
    is_plain = attention.q_norm is None and attention_norm.bias is None and mlp_norm.bias is None
    is_silu = mlp.is_gated and mlp.activation is functional.silu
    is_typed = all(
        matrix.dtype in _DTYPES and matrix.dtype == attention_norm.dtype == mlp_norm.dtype and matrix.is_contiguous()
        for matrix in matrices.values()
    )
    if not (is_plain and is_silu and is_typed and attention.head_dim % 2 == 0):
        return None
    if fused_kernels_for(*matrices.values()) is None:
        return None
    # Only here: it wants Triton, which need not be there.
    products = import_module("lepton_dist.kernels.cuda.products")
    return FusedLayer(products, matrices, attention_norm, attention, mlp_norm, mlp)
