"""The decoder: contiguous layers of a model, with the embedding before and the head behind where they belong to it.

The residual stream is float32 (it is what rounding errors add up in); matmuls run in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lepton_dist.kernels.activations import ACTIVATIONS
from lepton_dist.kernels.attention import ReadRows
from lepton_dist.kernels.cpu.layer import NativeLayer
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.held import HeldParameters
from lepton_dist.model.layers import Attend, Attention, Embedding, Linear, Mlp, Norm, Reduce
from lepton_dist.model.native_layer import native_layer
from lepton_dist.model.rope import RopeTables
from lepton_dist.plan.axes import Axis


@dataclass
class DecoderLayer:
    """Pre-norm attention and MLP. What each gives is added to the residual stream by the norm behind it."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    native: NativeLayer | None = None

    def __call__(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        layer: int,
        attend: Attend,
    ) -> torch.Tensor:
        """hidden float32 [tokens, hidden] += delta of the layer before, in place -> this layer's delta, to be added."""
        if self.native is not None and angles is not None and self.native.can_enter(arenas := attend.arenas(layer)):
            mixed = self.native.attention(hidden, delta, angles, arenas, attend.batch)
            return self.mlp.down.reduce(self.native.mlp(hidden, self.attention.output.reduce(mixed)))
        normed = self.attention_norm.add(hidden, delta)
        mixed = self.attention(normed, angles, layer, attend)
        return self.mlp(self.mlp_norm.add(hidden, mixed))

    def last(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
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


@dataclass
class Head:
    """The last norm and the projection to this rank's vocabulary rows."""

    norm: Norm
    projection: Linear

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, hidden] -> logits float32 [rows, vocab/tp]."""
        return self.projection(self.norm(hidden), torch.float32)


@dataclass
class Decoder:
    """This rank's shard of one stage."""

    embedding: Embedding | None
    layers: list[DecoderLayer]
    head: Head | None
    rope: RopeTables | None

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """tokens, positions int64 [tokens] -> float32 [tokens, hidden]; on the first stage only."""
        if self.embedding is None:
            raise ValueError("this stage has no embedding: only the first has")
        return self.embedding(tokens, positions)

    def run_layers(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        is_long: torch.Tensor | None,
        attend: Attend,
        read: ReadRows | None = None,
    ) -> torch.Tensor:
        """hidden float32 [tokens, hidden], positions int64 [tokens] -> hidden, changed in place.

        With `read`, on the last stage, the last layer computes those rows alone: -> [rows, hidden].
        """
        angles = None if self.rope is None else self.rope.rows(positions, is_long)
        delta, whole = None, self.layers if read is None else self.layers[:-1]
        for index, layer in enumerate(whole):
            delta = layer(hidden, delta, angles, index, attend)
        if read is not None:
            return self.layers[-1].last(hidden, delta, angles, len(whole), attend, read)
        return hidden if delta is None else hidden.add_(delta)


@dataclass(frozen=True)
class DecoderParts:
    """What a decoder is made from: its parameters, and how to sum over a contracted axis.

    All are on `device`, the CPU by default. `dtype` is that of the matmuls' activations.
    """

    config: ModelConfig
    held: HeldParameters
    reduce: Callable[[Axis], Reduce]
    dtype: torch.dtype
    first_vocab_row: int
    device: torch.device | None = None

    def linear(self, name: str, contracted: Axis) -> Linear:
        """The collective follows from the axis that the matmul contracts."""
        return Linear(
            self.held.matrices[f"{name}.weight"],
            self.held.tensors.get(f"{name}.bias"),
            self.reduce(contracted),
        )

    def tied_head(self) -> Linear:
        """The head that is the embedding's matrix, which the embedding keeps."""
        return Linear(self.held.tied_head(), None, self.reduce(Axis.EMBED))

    def norm(self, name: str) -> Norm:
        """The norm of this name."""
        tensors = self.held.tensors
        return Norm(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), self.config.norm_eps, self.dtype)


def build_decoder(parts: DecoderParts, layers: range) -> Decoder:
    """Assemble the layers of one stage from its parameters."""
    config = parts.config
    embedding = head = None
    if layers.start == 0:
        positions = parts.held.tensors.get("positions.weight")
        embedding = Embedding(
            parts.held.tensors["embedding.weight"], parts.first_vocab_row, positions, parts.reduce(Axis.VOCAB)
        )
    if layers.stop == config.shape.num_layers:
        has_own = "head.weight" in parts.held.matrices
        head = Head(parts.norm("final_norm"), parts.linear("head", Axis.EMBED) if has_own else parts.tied_head())
    rope = None if config.rope is None else RopeTables(config.rope, config.max_positions, parts.device)
    return Decoder(embedding, [_layer(parts, index) for index in layers], head, rope)


def _layer(parts: DecoderParts, index: int) -> DecoderLayer:
    config, at = parts.config, f"layers.{index}."
    attention = Attention(
        qkv=parts.linear(f"{at}qkv", Axis.EMBED),
        q_norm=parts.norm(f"{at}q_norm") if config.has_qk_norm else None,
        k_norm=parts.norm(f"{at}k_norm") if config.has_qk_norm else None,
        output=parts.linear(f"{at}attention_output", Axis.HEADS),
        head_dim=config.shape.head_dim,
        window=config.windows[index],
    )
    mlp = Mlp(
        up=parts.linear(f"{at}up", Axis.EMBED),
        down=parts.linear(f"{at}down", Axis.FFN),
        activation=ACTIVATIONS[config.activation],
        is_gated=config.is_gated,
    )
    norms = parts.norm(f"{at}attention_norm"), parts.norm(f"{at}mlp_norm")
    return make_layer(norms[0], attention, norms[1], mlp, 0 if config.rope is None else config.rope.dim)


def make_layer(attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: Mlp, rotated: int) -> DecoderLayer:
    """A layer of these parts, in the fastest form that there is; `rotated` channels of each head turn."""
    native = native_layer(attention_norm, attention, mlp_norm, mlp, rotated)
    return DecoderLayer(attention_norm, attention, mlp_norm, mlp, native)
