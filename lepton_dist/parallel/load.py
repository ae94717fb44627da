"""Loading a rank's shard: its own slices straight into place, each byte read once when there are several replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.world import World
from lepton_dist.kernels.cpu.memory import fresh_zeros
from lepton_dist.model.parameters import ParameterTable
from lepton_dist.parallel.requirements import Need, is_norm, seat_needs
from lepton_dist.plan.axes import Span
from lepton_dist.plan.placement import Seat
from lepton_dist.storage.distribution import Piece, Rectangle, cut_pieces
from lepton_dist.storage.index import CheckpointIndex
from lepton_dist.storage.slices import SliceReader

Take = Callable[[str, torch.Tensor], None]
"""Keeps a loaded parameter, by name."""

_CPU = torch.device("cpu")


class _Arriving:
    """The parameters of a seat on their way: made when their first piece comes, handed on when the last is there."""

    def __init__(self, table: ParameterTable, seat: Seat, dtype: torch.dtype, device: torch.device, take: Take) -> None:
        self._shapes = {one.name: one.local_shape(seat.spans) for one in table.of_stage(seat.layers)}
        self._dtype, self._device, self._take = dtype, device, take
        self._tensors: dict[str, torch.Tensor] = {}
        self._missing: Counter[str] = Counter()

    def expect(self, need: Need, pieces: int) -> None:
        """So many pieces will come for a need."""
        self._missing[need.parameter] += pieces

    def target(self, need: Need, piece: Rectangle) -> torch.Tensor:
        """The part of the parameter that a piece of a need's rectangle goes to, in stored orientation."""
        if need.parameter not in self._tensors:
            self._tensors[need.parameter] = self._empty(need.parameter)
        whole = self._tensors[need.parameter][need.rows.start : need.rows.stop]
        if need.columns is not None:
            whole = whole[:, need.columns.start : need.columns.stop]
        if need.transposed:
            whole = whole.t()
        view = whole[_inside(piece.rows, need.rectangle.rows)]
        if piece.columns is None or need.rectangle.columns is None:
            return view
        return view[:, _inside(piece.columns, need.rectangle.columns)]

    def filled(self, need: Need) -> None:
        """A piece of a need is in place."""
        self._missing[need.parameter] -= 1
        if self._missing[need.parameter] == 0:
            self._take(need.parameter, self._tensors.pop(need.parameter))

    def _empty(self, name: str) -> torch.Tensor:
        dtype = torch.float32 if is_norm(name) else self._dtype
        if self._device.type == "cpu":
            return fresh_zeros(self._shapes[name], dtype)
        return torch.empty(self._shapes[name], dtype=dtype, device=self._device)


def load_seat(
    world: World,
    index: CheckpointIndex,
    table: ParameterTable,
    seats: Mapping[int, Seat],
    dtype: torch.dtype,
    take: Take,
    device: torch.device = _CPU,
) -> None:
    """Load this rank's parameters straight to its `device`, norms in float32, the rest in `dtype`.

    Each is handed to `take` as soon as it is whole. Collective over all the ranks of the plan. Peak memory is what
    `take` keeps, a parameter or with replicas a few, one bounded read buffer, and one piece that is passed on.

    Raises:
        CheckpointError: a weight file ends early or cannot be read.
    """
    seat = seats[world.rank]
    arriving = _Arriving(table, seat, dtype, device, take)
    mine = list(seat_needs(table, seat))
    has_replicas = any(other.replica != seat.replica for other in seats.values())
    with SliceReader(torch.get_num_threads()) as reader:
        if has_replicas:
            needs = {rank: [need.rectangle for need in seat_needs(table, other)] for rank, other in seats.items()}
            _load_shared(world, index, arriving, mine, cut_pieces(needs), reader)
            return
        for need in mine:
            arriving.expect(need, 1)
        for need in mine:
            rectangle = need.rectangle
            target = arriving.target(need, rectangle)
            reader.read(index[rectangle.source], rectangle.rows, rectangle.columns, target)
            arriving.filled(need)


def _inside(part: Span, whole: Span) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _load_shared(
    world: World,
    index: CheckpointIndex,
    arriving: _Arriving,
    mine: list[Need],
    cut: Mapping[Rectangle, list[Piece]],
    reader: SliceReader,
) -> None:
    """Every rank walks its pieces in one global order; the first rank of a piece reads it, the others receive it."""
    needs_of: dict[Piece, list[Need]] = {}
    for need in mine:
        arriving.expect(need, len(cut[need.rectangle]))
        for piece in cut[need.rectangle]:
            needs_of.setdefault(piece, []).append(need)
    order = {piece: number for number, piece in enumerate(piece for pieces in cut.values() for piece in pieces)}
    group_of = _group_cache(world)
    for piece in sorted(needs_of, key=order.__getitem__):
        rectangle, needs = piece.rectangle, needs_of[piece]
        stored = index[rectangle.source]
        views = [arriving.target(need, rectangle) for need in needs]
        first = views[0]
        is_place = first.is_cpu and first.is_contiguous()  # pieces travel between CPUs, whatever the ranks compute on
        buffer = first if is_place else torch.empty(first.shape, dtype=first.dtype)
        if piece.ranks[0] == world.rank:
            reader.read(stored, rectangle.rows, rectangle.columns, buffer)
        group = group_of(tuple(sorted(piece.ranks)))
        group.broadcast(buffer, root=group.members.index(piece.ranks[0]))
        for view, need in zip(views, needs, strict=True):
            if view is not buffer:
                view.copy_(buffer)
            arriving.filled(need)


def _group_cache(world: World) -> Callable[[tuple[int, ...]], Group]:
    groups: dict[tuple[int, ...], Group] = {}

    def group_of(members: tuple[int, ...]) -> Group:
        if members not in groups:
            groups[members] = world.group(members, f"load-{'-'.join(map(str, members))}")
        return groups[members]

    return group_of
