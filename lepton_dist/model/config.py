"""What a decoder needs to know of a model, whatever family its checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lepton_dist.plan.axes import ModelShape

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) with one of the scalings of Llama-type checkpoints.

    `parameters` are the checkpoint's own (factor, low_freq_factor, short_factor, ...), and so are its `positions`,
    max_position_embeddings.
    """

    theta: float
    dim: int
    positions: int = 2048
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def context_tokens(self) -> int:
        """Positions that the scaling makes of those that the model was trained on."""
        factor = self.parameters.get("factor", 1.0)
        if self.kind == "linear":
            scaled = self.positions * factor
        elif self.kind == "yarn":
            scaled = self.parameters["original_max_position_embeddings"] * factor
        else:
            scaled = self.positions
        return int(min(max(self.positions, scaled), 2**31 - 1))


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer.

    `windows` holds the sliding attention window of each layer in tokens, None for full attention. `rope` is None for
    learned positions. `dtype` is "" where config.json leaves it to the weights. `biases` names the linear layers that
    have one: ``qkv``, ``attention_output``, ``mlp``.
    """

    family: str
    shape: ModelShape
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: str
    is_gated: bool
    rope: RopeConfig | None
    max_positions: int
    windows: tuple[int | None, ...]
    biases: frozenset[str] = frozenset()
    has_qk_norm: bool = False
    is_tied: bool = False
    dtype: str = ""
    eos_token_ids: tuple[int, ...] = ()

    @property
    def long_after(self) -> int | None:
        """Prompts longer than this use the long factors of `longrope` throughout; None for every other scaling."""
        if self.rope is None or self.rope.kind != "longrope":
            return None
        return int(self.rope.parameters["original_max_position_embeddings"])
