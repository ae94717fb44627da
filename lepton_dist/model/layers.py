"""The parts of a decoder. Whether a contraction means a collective is not their business: they are given `reduce`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lepton_dist.kernels.activations import gated
from lepton_dist.kernels.attention import PagedBatch, ReadRows
from lepton_dist.kernels.linear import Weight
from lepton_dist.kernels.norms import add_rms_norm, layer_norm, norm_heads, rms_norm

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of the rotation of each token: float32 [tokens, 1, dim / 2]."""

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums partial results over the ranks that share a contracted axis; the identity where it is not sharded."""


def unreduced(part: torch.Tensor) -> torch.Tensor:
    """The `Reduce` of an axis that is not sharded."""
    return part


class Attend(Protocol):
    """Attention of a batch with whatever keeps the keys and values."""

    @property
    def batch(self) -> PagedBatch:
        """Where the batch's tokens lie."""
        ...

    def __call__(
        self,
        layer: int,
        turned: torch.Tensor,
        value: torch.Tensor,
        angles: Angles | None,
        window: int | None,
        read: ReadRows | None = None,
    ) -> torch.Tensor:
        """Rotate by `angles`, keep keys and values, and attend with all rows, or those that are `read`.

        turned [tokens, heads + kv_heads, head_dim], queries before keys; value [tokens, kv_heads, head_dim]; angles cos
        and sin [tokens, 1, dim / 2], or None -> [rows, heads, head_dim].
        """
        ...

    def arenas(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer, for kernels that do all that and more by themselves."""
        ...

    def of_rows(self, rows: NDArray[np.int64]) -> Attend:
        """The same for some of the batch's rows alone, ascending int64 [r]."""
        ...


@dataclass
class Linear:
    """y = reduce(x W^T) + b. The bias of a sharded contraction is held whole and added once, after the sum."""

    weight: Weight
    bias: torch.Tensor | None
    reduce: Reduce

    def __call__(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[tokens, in] -> [tokens, out] in `dtype`, by default that of `x`."""
        return self.whole(self.weight.matmul(x, dtype))

    @property
    def is_product(self) -> bool:
        """Whether the product with the weight is all: no sum over ranks and no bias."""
        return self.reduce is unreduced and self.bias is None

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """This rank's product [tokens, out] -> the sum over ranks, with the bias; in place."""
        y = self.reduce(part)
        return y if self.bias is None else y.add_(self.bias)


@dataclass
class Norm:
    """RMS norm, or layer norm where there is a bias. Weights are float32; the result has the dtype of the matmuls."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    dtype: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] of any float dtype -> [..., dim] of the matmuls' dtype."""
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps, self.dtype)
        return layer_norm(x, self.weight, self.bias, self.eps, self.dtype)

    def add(self, hidden: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        """hidden float32 [tokens, dim] += delta, in place, where there is one; then the norm of the sum."""
        if delta is None:
            return self(hidden)
        if self.bias is None:
            return add_rms_norm(hidden, delta, self.weight, self.eps, self.dtype)
        hidden += delta
        return self(hidden)


@dataclass
class Embedding:
    """Rows [first, first + rows) of the vocabulary, and learned positions where the family has them."""

    weight: torch.Tensor
    first: int
    positions: torch.Tensor | None
    reduce: Reduce

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """tokens, positions int64 [tokens] -> float32 [tokens, hidden]."""
        local = tokens - self.first
        is_elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = functional.embedding(local.masked_fill(is_elsewhere, 0), self.weight)
        # Exactly one rank has a row that is not zero, so the sum is exact in any dtype.
        hidden = self.reduce(rows.masked_fill_(is_elsewhere.unsqueeze(1), 0)).float()
        return hidden if self.positions is None else hidden + functional.embedding(positions, self.positions)


@dataclass
class Attention:
    """Grouped-query attention. Head counts come from the shapes of the local weights.

    Norms of queries and keys are RMS norms with one epsilon; there are both or none.
    """

    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    output: Linear
    head_dim: int
    window: int | None

    @property
    def num_heads(self) -> int:
        """This rank's query heads."""
        return self.output.weight.in_features // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """This rank's KV heads."""
        return (self.qkv.weight.out_features // self.head_dim - self.num_heads) // 2

    def mix(
        self,
        x: torch.Tensor,
        angles: Angles | None,
        layer: int,
        attend: Attend,
        read: ReadRows | None = None,
    ) -> torch.Tensor:
        """What goes into the output's matmul, of all rows or those that are `read`: [rows, heads/tp * head_dim]."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        # [tokens, (heads + 2 kv_heads)/tp, head_dim]
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        turned, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            turned = norm_heads(turned, heads, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        return attend(layer, turned, value, angles, self.window, read).flatten(1)


@dataclass
class Mlp:
    """down(act(gate) * up), or down(act(up)) where the family is not gated."""

    up: Linear
    down: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_gated: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        return self.down(self.inner(x))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What goes into the last matmul: [tokens, ffn/tp]."""
        inner = self.up(x)  # [tokens, 2 ffn/tp] when gated
        return gated(inner, self.activation) if self.is_gated else self.activation(inner)
