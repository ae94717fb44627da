"""Loading a rank's shard: its own slices straight into place, each byte read once when there are several replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.world import World
from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.cpu.memory import fresh_zeros
from lepton_dist.model.held import HeldParameters
from lepton_dist.model.parameters import ParameterTable
from lepton_dist.parallel.packing import PackedMatrix, Packing, packed_matrices
from lepton_dist.parallel.requirements import Need, is_norm, seat_needs
from lepton_dist.plan.axes import Span
from lepton_dist.plan.placement import Seat, has_replicas
from lepton_dist.plan.precision import Dtypes
from lepton_dist.storage.distribution import Piece, Rectangle, cut_pieces
from lepton_dist.storage.index import CheckpointIndex
from lepton_dist.storage.slices import SliceReader

_CPU = torch.device("cpu")


class _Arriving:
    """The parameters of a seat on their way: made when their first piece comes, handed on when the last is there."""

    def __init__(
        self, table: ParameterTable, seat: Seat, dtype: torch.dtype, device: torch.device, held: HeldParameters
    ) -> None:
        self._shapes = {one.name: one.local_shape(seat.spans) for one in table.of_stage(seat.layers)}
        self._dtype, self._device, self._held = dtype, device, held
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
            self._held.take(need.parameter, self._tensors.pop(need.parameter))

    def _empty(self, name: str) -> torch.Tensor:
        dtype, shape = torch.float32 if is_norm(name) else self._dtype, self._shapes[name]
        if self._device.type == "cpu":
            return fresh_zeros(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self._device)


def load_seat(
    world: World,
    index: CheckpointIndex,
    table: ParameterTable,
    seats: Mapping[int, Seat],
    dtypes: Dtypes,
    device: torch.device = _CPU,
    begun: Packing | None = None,
) -> HeldParameters:
    """Load this rank's parameters, straight to its `device`, norms in float32, the rest as the plan says.

    Collective over all the ranks of the plan. Peak memory is what is held, bounded read buffers, and where rows cannot
    be packed as they come a parameter, or with replicas a few and one piece that is passed on. Of what was `begun`
    already use is made if it is what this seat needs.

    Raises:
        CheckpointError: a weight file ends early or cannot be read.
    """
    seat, held, threads = seats[world.rank], HeldParameters(dtypes.weights), torch.get_num_threads()
    arriving = _Arriving(table, seat, getattr(torch, dtypes.compute), device, held)
    is_shared, mine = has_replicas(seats), list(seat_needs(table, seat))
    packed = packed_matrices(index, table, seat, dtypes) if device.type == "cpu" and not is_shared else ()
    with closing(_take_up(begun, packed)) as packing, SliceReader(threads) as reader:
        if is_shared:
            needs = {rank: [need.rectangle for need in seat_needs(table, other)] for rank, other in seats.items()}
            _load_shared(world, index, arriving, mine, cut_pieces(needs), reader)
        else:
            by_rows = {one.name for one in packed}
            _load_whole(arriving, [need for need in mine if need.parameter not in by_rows], index, reader)
        held.matrices.update((name, PanelWeight(panels)) for name, panels in packing.finish(threads).items())
    return held


def _take_up(begun: Packing | None, packed: Sequence[PackedMatrix]) -> Packing:
    """What was begun if it is what is wanted, or a new beginning."""
    if begun is not None and begun.matrices == packed:
        return begun
    if begun is not None:
        begun.close()
    return Packing(packed)


def _load_whole(arriving: _Arriving, needs: Sequence[Need], index: CheckpointIndex, reader: SliceReader) -> None:
    for need in needs:
        arriving.expect(need, 1)
    for need in needs:
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
