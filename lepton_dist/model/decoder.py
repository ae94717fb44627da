"""The decoder: contiguous layers of a model, with the embedding before and the head behind where they belong to it.

The residual stream is float32 (it is what rounding errors add up in); matmuls run in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lepton_dist.kernels.activations import ACTIVATIONS
from lepton_dist.kernels.attention import ReadRows
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.decoder_layer import DecoderLayer, make_layer
from lepton_dist.model.held import HeldParameters
from lepton_dist.model.layers import Attend, Attention, Embedding, Linear, Mlp, Norm, Reduce
from lepton_dist.model.overlap import Overlap, run_in_one_piece
from lepton_dist.model.rope import RopeTables
from lepton_dist.plan.axes import Axis


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
    """This rank's shard of one stage. With `overlap` sums travel while others of a step's rows are computed."""

    embedding: Embedding | None
    layers: list[DecoderLayer]
    head: Head | None
    rope: RopeTables | None
    overlap: Overlap | None = None

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
        if whole:
            run = run_in_one_piece if self.overlap is None else self.overlap.run
            delta = run(whole, hidden, angles, attend)
        if read is not None:
            return self.layers[-1].last(hidden, delta, angles, len(whole), attend, read)
        return hidden if delta is None else hidden.add_(delta)


@dataclass(frozen=True)
class DecoderParts:
    """What a decoder is made from: its parameters, and how to sum over a contracted axis.

    All are on `device`, the CPU by default. `dtype` is that of the matmuls' activations, `positions` how many there are
    to turn by: by default all that the model knows.
    """

    config: ModelConfig
    held: HeldParameters
    reduce: Callable[[Axis], Reduce]
    dtype: torch.dtype
    first_vocab_row: int
    device: torch.device | None = None
    overlap: Overlap | None = None
    positions: int | None = None

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
    length = parts.positions or config.max_positions
    rope = None if config.rope is None else RopeTables(config.rope, length, parts.device)
    return Decoder(embedding, [_layer(parts, index) for index in layers], head, rope, parts.overlap)


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
