"""Loading a rank's shard: its own slices straight into place, each byte read once when there are several replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.world import World
from lepton_dist.model.parameters import ParameterTable
from lepton_dist.parallel.requirements import Need, is_norm, seat_needs
from lepton_dist.plan.axes import Span
from lepton_dist.plan.placement import Seat
from lepton_dist.storage.distribution import Piece, Rectangle, cut_pieces
from lepton_dist.storage.index import CheckpointIndex
from lepton_dist.storage.slices import SliceReader


def allocate(table: ParameterTable, seat: Seat, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Empty tensors for every parameter of a seat: norms in float32, the rest in `dtype`."""
    return {
        parameter.name: torch.empty(
            parameter.local_shape(seat.spans), dtype=torch.float32 if is_norm(parameter.name) else dtype
        )
        for parameter in table.of_stage(seat.layers)
    }


def load_seat(
    world: World, index: CheckpointIndex, table: ParameterTable, seats: Mapping[int, Seat], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Load this rank's parameters. Collective over all the ranks of the plan.

    Peak memory is the shard, one bounded read buffer, and one piece that is passed on.

    Raises:
        CheckpointError: a weight file ends early or cannot be read.
    """
    seat = seats[world.rank]
    tensors = allocate(table, seat, dtype)
    mine = list(seat_needs(table, seat))
    has_replicas = any(other.replica != seat.replica for other in seats.values())
    with SliceReader() as reader:
        if has_replicas:
            needs = {rank: [need.rectangle for need in seat_needs(table, other)] for rank, other in seats.items()}
            _load_shared(world, index, tensors, mine, cut_pieces(needs), reader)
        else:
            for need in mine:
                target = _target(tensors, need, need.rectangle)
                reader.read(index[need.rectangle.source], need.rectangle.rows, need.rectangle.columns, target)
    return tensors


def _target(tensors: Mapping[str, torch.Tensor], need: Need, piece: Rectangle) -> torch.Tensor:
    """The part of the parameter that a piece of a need's rectangle goes to, in stored orientation."""
    whole = tensors[need.parameter][need.rows.start : need.rows.stop]
    if need.columns is not None:
        whole = whole[:, need.columns.start : need.columns.stop]
    if need.transposed:
        whole = whole.t()
    view = whole[_inside(piece.rows, need.rectangle.rows)]
    if piece.columns is None or need.rectangle.columns is None:
        return view
    return view[:, _inside(piece.columns, need.rectangle.columns)]


def _inside(part: Span, whole: Span) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _load_shared(
    world: World,
    index: CheckpointIndex,
    tensors: Mapping[str, torch.Tensor],
    mine: list[Need],
    cut: Mapping[Rectangle, list[Piece]],
    reader: SliceReader,
) -> None:
    """Every rank walks its pieces in one global order; the first rank of a piece reads it, the others receive it."""
    targets: dict[Piece, list[torch.Tensor]] = {}
    for need in mine:
        for piece in cut[need.rectangle]:
            targets.setdefault(piece, []).append(_target(tensors, need, piece.rectangle))
    order = {piece: number for number, piece in enumerate(piece for pieces in cut.values() for piece in pieces)}
    group_of = _group_cache(world)
    for piece in sorted(targets, key=order.__getitem__):
        rectangle, views = piece.rectangle, targets[piece]
        stored = index[rectangle.source]
        buffer = views[0] if views[0].is_contiguous() else torch.empty(views[0].shape, dtype=views[0].dtype)
        if piece.ranks[0] == world.rank:
            reader.read(stored, rectangle.rows, rectangle.columns, buffer)
        group = group_of(tuple(sorted(piece.ranks)))
        group.broadcast(buffer, root=group.members.index(piece.ranks[0]))
        for view in views:
            if view is not buffer:
                view.copy_(buffer)


def _group_cache(world: World) -> Callable[[tuple[int, ...]], Group]:
    groups: dict[tuple[int, ...], Group] = {}

    def group_of(members: tuple[int, ...]) -> Group:
        if members not in groups:
            groups[members] = world.group(members, f"load-{'-'.join(map(str, members))}")
        return groups[members]

    return group_of
