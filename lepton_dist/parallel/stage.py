"""This rank's stage of a replica: its groups, its decoder, and its links to the stages before and behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from lepton_dist.comm.devices import Devices
from lepton_dist.comm.group import Group
from lepton_dist.comm.transport import Handle
from lepton_dist.comm.wire import Int8AllReduce, make_wire
from lepton_dist.comm.world import World
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.decoder import Decoder, DecoderParts, build_decoder
from lepton_dist.model.held import HeldParameters
from lepton_dist.model.layers import Reduce, unreduced
from lepton_dist.model.overlap import Overlap
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


Hop = tuple[int, int]
"""A world rank, and one of the next stage that has its activations from it."""


def hops(replica: Replica) -> list[Hop]:
    """Every hop of a replica, in an order that is the same on all of its ranks.

    Activations are whole on every rank of a stage, so rank j of a stage receives from rank j mod n of the n before it.
    """
    return [
        (before.ranks[j % len(before.ranks)], rank)
        for before, behind in pairwise(replica.stages)
        for j, rank in enumerate(behind.ranks)
    ]


class StageLink:
    """Activations between stages: received ahead of need, sent without waiting."""

    def __init__(
        self,
        seat: Seat,
        groups: Mapping[Hop, Group],
        hidden: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        """`groups` carry the hops that this seat is an end of; activations are on `device`, the CPU by default."""
        self.dtype = dtype  # the plan's `precision.wire`
        self._wire = make_wire(hidden, dtype, device)
        ends = [(hop, group, group.members.index) for hop, group in groups.items()]
        self._source = next(((group, of(hop[0])) for hop, group, of in ends if hop[1] == seat.rank), None)
        self._targets = [(group, of(hop[1])) for hop, group, of in ends if hop[0] == seat.rank]
        self._expected: deque[tuple[torch.Tensor, Handle]] = deque()
        self._sending: deque[Handle] = deque()

    def expect(self, num_tokens: int) -> None:
        """Post the receive of the next batch's activations; nothing on the first stage."""
        if self._source is not None:
            buffer = self._wire.buffer(num_tokens)
            group, source = self._source
            self._expected.append((buffer, group.irecv(buffer, source)))

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
        self._sending.extend(group.isend(packed, target) for group, target in self._targets)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        while self._sending:
            self._sending.popleft().wait()


def stage_group(world: World, replica: Replica, seat: Seat, name: str) -> Group:
    """The tensor-parallel group of a seat's stage. Collective over the stage."""
    return world.group(replica.stages[seat.stage].ranks, f"{name}-replica{seat.replica}-stage{seat.stage}")


def open_hops(world: World, replica: Replica, seat: Seat, devices: Devices) -> dict[Hop, Group]:
    """The groups of the hops that a seat is an end of. Collective over the replica.

    Between CPUs the replica's own group carries them all. A hop from or to a GPU has a group of its two ends: NCCL
    would hold up what goes one way behind what comes the other.
    """
    whole = world.group(replica.ranks, f"replica{seat.replica}")
    found = {}
    for hop in hops(replica):
        if seat.rank not in hop:
            continue
        if any(devices.bindings[end].is_gpu for end in hop):
            group = world.group(hop, f"hop-{hop[0]}-{hop[1]}")
            found[hop] = devices.serve(group, is_one_way=True)
        else:
            found[hop] = whole
    return found


def reduce_over(group: Group, wire: torch.dtype, device: torch.device | None = None) -> Callable[[Axis], Reduce]:
    """The rule of the plan: every axis but `embed` is sharded over the stage's group, so contracting it means a sum.

    Between nodes an int8 wire carries the sums too; inside a node they are exact, and so is that of the embedding.
    """
    inner = Int8AllReduce(group, device) if wire == torch.int8 and group.num_nodes > 1 else group.all_reduce

    def reduce(axis: Axis) -> Reduce:
        if axis == Axis.EMBED or group.size == 1:
            return unreduced
        return group.all_reduce if axis == Axis.VOCAB else inner

    return reduce


def _largest(group: Group, value: float) -> float:
    """The largest of the members' values."""
    return float(group.all_reduce(torch.tensor([value], dtype=torch.float64), "max"))


def build_stage(
    seat: Seat,
    config: ModelConfig,
    held: HeldParameters,
    dtypes: Dtypes,
    tp: Group,
    link: StageLink,
    device: torch.device | None = None,
    *,
    overlaps: bool = False,
    positions: int | None = None,
) -> ParallelStage:
    """Assemble a rank's stage from its loaded parameters, all of them on `device`, for sequences up to `positions`.

    With `overlaps` sums between nodes travel while others of a step's rows are computed, on CPUs.
    """
    vocab_start = seat.spans[Axis.VOCAB][0].start
    dtype: torch.dtype = getattr(torch, dtypes.compute)
    reduce = reduce_over(tp, link.dtype, device)
    is_far = tp.num_nodes > 1 and (device is None or device.type == "cpu")
    overlap = Overlap(partial(_largest, tp)) if overlaps and is_far else None
    parts = DecoderParts(config, held, reduce, dtype, vocab_start, device, overlap, positions)
    return ParallelStage(seat, build_decoder(parts, seat.layers), tp, link, vocab_start, config.shape.vocab)
