"""This rank's stage of a replica: its groups, its decoder, and its links to the stages before and behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.transport import Handle
from lepton_dist.comm.wire import Int8AllReduce, make_wire
from lepton_dist.comm.world import World
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.decoder import Decoder, DecoderParts, build_decoder
from lepton_dist.model.layers import Reduce
from lepton_dist.plan.axes import Axis
from lepton_dist.plan.placement import Seat
from lepton_dist.plan.plan import Replica
from lepton_dist.plan.precision import Dtypes


@dataclass
class ParallelStage:
    """What a rank computes with. `tp` is the group of the stage; of `vocab` rows it holds those from `vocab_start`."""

    seat: Seat
    decoder: Decoder
    tp: Group
    link: StageLink
    vocab_start: int
    vocab: int


class StageLink:
    """Activations between stages: received ahead of need, sent without waiting.

    Activations are whole on every rank of a stage, so rank j of a stage receives from rank j mod n of the n before it.
    """

    def __init__(self, replica: Replica, seat: Seat, group: Group, hidden: int, dtype: torch.dtype) -> None:
        self.dtype = dtype  # the plan's `precision.wire`
        self._group, self._wire = group, make_wire(hidden, dtype)
        self._source: int | None = None
        self._targets: list[int] = []
        if not seat.is_first:
            before = replica.stages[seat.stage - 1].ranks
            self._source = group.members.index(before[seat.shard % len(before)])
        if not seat.is_last:
            own, behind = replica.stages[seat.stage].ranks, replica.stages[seat.stage + 1].ranks
            self._targets = [group.members.index(rank) for j, rank in enumerate(behind) if j % len(own) == seat.shard]
        self._expected: deque[tuple[torch.Tensor, Handle]] = deque()
        self._sending: deque[Handle] = deque()

    def expect(self, num_tokens: int) -> None:
        """Post the receive of the next batch's activations; nothing on the first stage."""
        if self._source is not None:
            buffer = self._wire.buffer(num_tokens)
            self._expected.append((buffer, self._group.irecv(buffer, self._source)))

    def receive(self) -> torch.Tensor:
        """The activations of the oldest expected batch: float32 [tokens, hidden]."""
        buffer, handle = self._expected.popleft()
        handle.wait()
        return self._wire.unpack(buffer)

    def send(self, hidden: torch.Tensor) -> None:
        """Pass activations [tokens, hidden] on; returns at once."""
        while self._sending and self._sending[0].test():
            self._sending.popleft()
        packed = self._wire.pack(hidden)
        self._sending.extend(self._group.isend(packed, target) for target in self._targets)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        while self._sending:
            self._sending.popleft().wait()


def stage_group(world: World, replica: Replica, seat: Seat, name: str) -> Group:
    """The tensor-parallel group of a seat's stage. Collective over the stage."""
    return world.group(replica.stages[seat.stage].ranks, f"{name}-replica{seat.replica}-stage{seat.stage}")


def reduce_over(group: Group, wire: torch.dtype) -> Callable[[Axis], Reduce]:
    """The rule of the plan: every axis but `embed` is sharded over the stage's group, so contracting it means a sum.

    Between nodes an int8 wire carries the sums too; inside a node they are exact, and so is that of the embedding.
    """
    inner = Int8AllReduce(group) if wire == torch.int8 and group.num_nodes > 1 else group.all_reduce

    def reduce(axis: Axis) -> Reduce:
        if axis == Axis.EMBED:
            return _identity
        return group.all_reduce if axis == Axis.VOCAB else inner

    return reduce


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def build_stage(
    seat: Seat, config: ModelConfig, tensors: dict[str, torch.Tensor], dtypes: Dtypes, tp: Group, link: StageLink
) -> ParallelStage:
    """Assemble a rank's stage from its loaded tensors."""
    vocab_start = seat.spans[Axis.VOCAB][0].start
    dtype: torch.dtype = getattr(torch, dtypes.compute)
    parts = DecoderParts(config, tensors, reduce_over(tp, link.dtype), dtype, dtypes.weights, vocab_start)
    return ParallelStage(seat, build_decoder(parts, seat.layers), tp, link, vocab_start, config.shape.vocab)
