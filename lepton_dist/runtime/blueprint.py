"""What a model directory and a plan say of every rank, before any rank does anything. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.parameters import ParameterTable
from lepton_dist.parallel.checkpoint import Checkpoint
from lepton_dist.parallel.requirements import kv_heads_of
from lepton_dist.plan.placement import Seat, seats
from lepton_dist.plan.plan import EngineLimits, Plan
from lepton_dist.storage.index import CheckpointIndex

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Blueprint:
    """What follows from a model directory and a resolved plan, without any communication."""

    checkpoint: Checkpoint
    plan: Plan

    @staticmethod
    def draw(model: str, plan: Plan, world_size: int, checkpoint: Checkpoint | None = None) -> Blueprint:
        """Fit a plan to a checkpoint, whose headers are read unless it is given.

        Raises:
            CheckpointError: the checkpoint is incomplete or unknown.
            ConfigError: the plan does not fit the model or the world.
        """
        read = Checkpoint.read(model) if checkpoint is None else checkpoint
        return Blueprint(read, plan.resolve(read.config.shape, world_size))

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.checkpoint.config

    @property
    def index(self) -> CheckpointIndex:
        """Where its tensors lie."""
        return self.checkpoint.index

    @property
    def table(self) -> ParameterTable:
        """Its parameters."""
        return self.checkpoint.table

    @cached_property
    def seats(self) -> Mapping[int, Seat]:
        """The seat of every rank that the plan uses."""
        return seats(self.plan, self.config.shape)

    @property
    def limits(self) -> EngineLimits:
        """The engine's limits."""
        return self.plan.engine

    @property
    def context_tokens(self) -> int:
        """Tokens of prompt and output together."""
        asked = self.plan.engine.context_tokens
        return self.config.max_positions if asked == "auto" else min(asked, self.config.max_positions)

    def geometry(self, seat: Seat, dtype: torch.dtype) -> KvGeometry:
        """The shape of a seat's KV cache, whose values are of `dtype`."""
        shape = self.config.shape
        return KvGeometry(len(seat.layers), kv_heads_of(seat), shape.head_dim, self.limits.block_tokens, dtype)

    def most_blocks(self) -> int:
        """Blocks that `max_sequences` sequences at the full context take."""
        return self.limits.max_sequences * -(-self.context_tokens // self.limits.block_tokens)
