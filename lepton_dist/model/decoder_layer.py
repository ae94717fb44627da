"""One layer of a decoder: pre-norm attention and MLP, each ending in a sum over the ranks of a stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lepton_dist.kernels.attention import ReadRows
from lepton_dist.kernels.cpu.layer import NativeLayer
from lepton_dist.model.fused_layer import FusedLayer, fused_layer
from lepton_dist.model.layers import Angles, Attend, Attention, Mlp, Norm
from lepton_dist.model.native_layer import native_layer


@dataclass
class DecoderLayer:
    """Pre-norm attention and MLP. What each gives is added to the residual stream by the norm behind it."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    native: NativeLayer | None = None
    fused: FusedLayer | None = None

    def __call__(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, angles: Angles | None, layer: int, attend: Attend
    ) -> torch.Tensor | None:
        """hidden float32 [tokens, hidden] += delta of the layer before, in place -> this layer's delta, to be added.

        None where it was added already.
        """
        if self.fused is not None and self.fused.can_run(hidden, attend.batch):
            self.fused(hidden, delta, angles, attend.arenas(layer), attend.batch)
            return None
        mixed = self.attention.output.whole(self.attention_half(hidden, delta, angles, layer, attend))
        return self.mlp.down.whole(self.mlp_half(hidden, mixed))

    def attention_half(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, angles: Angles | None, layer: int, attend: Attend
    ) -> torch.Tensor:
        """hidden += delta, in place -> this rank's part of what attention adds, for `attention.output.whole`."""
        if self.native is not None and angles is not None and self.native.can_enter(arenas := attend.arenas(layer)):
            return self.native.attention(hidden, delta, angles, arenas, attend.batch)
        normed = self.attention_norm.add(hidden, delta)
        return self.attention.output.weight.matmul(self.attention.mix(normed, angles, layer, attend))

    def mlp_half(self, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """hidden += what attention adds, in place -> this rank's part of what the MLP adds, for `mlp.down.whole`.

        It may lie where `mixed` was.
        """
        if self.native is not None:
            return self.native.mlp(hidden, mixed)
        return self.mlp.down.weight.matmul(self.mlp.inner(self.mlp_norm.add(hidden, mixed)))

    def last(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        angles: Angles | None,
        layer: int,
        attend: Attend,
        read: ReadRows,
    ) -> torch.Tensor:
        """As a model's last layer, from which few rows are read: all leave keys and values, those alone go on.

        -> their residual stream, this layer's delta in it: float32 [rows, hidden].
        """
        normed = self.attention_norm.add(hidden, delta)
        mixed = self.attention.mix(normed, angles, layer, attend, read)
        kept = hidden[read.index]
        if not read.index.numel():
            return kept
        return kept.add_(self.mlp(self.mlp_norm.add(kept, self.attention.output(mixed))))


def make_layer(attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: Mlp, rotated: int) -> DecoderLayer:
    """A layer of these parts, in the fastest form that there is; `rotated` channels of each head turn."""
    native = native_layer(attention_norm, attention, mlp_norm, mlp, rotated)
    fused = fused_layer(attention_norm, attention, mlp_norm, mlp)
    return DecoderLayer(attention_norm, attention, mlp_norm, mlp, native, fused)
