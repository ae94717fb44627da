"""Loading a rank's shard: its own slices straight into place, each byte read once when there are several replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.world import World
from lepton_dist.kernels.cpu.matmul import PanelWeight, panel_rows
from lepton_dist.kernels.cpu.memory import fresh_zeros, lasting_zeros
from lepton_dist.model.held import HeldParameters
from lepton_dist.model.parameters import ParameterTable, is_factor
from lepton_dist.parallel.requirements import Need, is_norm, seat_needs
from lepton_dist.plan.axes import Span
from lepton_dist.plan.placement import Seat
from lepton_dist.storage.distribution import Piece, Rectangle, cut_pieces
from lepton_dist.storage.index import CheckpointIndex
from lepton_dist.storage.slices import SliceReader

_CPU = torch.device("cpu")
_PIECE_BYTES = 1 << 20  # read and packed at once by a thread: a piece that is still in its cache when it is packed


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

    def panels(self, needs: Sequence[Need], index: CheckpointIndex) -> PanelWeight | None:
        """Panels for a parameter whose rows can be packed as they are read; None for one that has to be whole first."""
        name = needs[0].parameter
        shape = self._shapes[name]
        if len(shape) < 2 or not all(self._is_of_whole_rows(need, index) for need in needs):
            return None
        return self._held.by_rows(name, shape, self._dtype, self._device)

    def _is_of_whole_rows(self, need: Need, index: CheckpointIndex) -> bool:
        """Whether a need fills whole rows of its parameter, as they are stored, from the first of a panel on."""
        is_wide = need.columns == Span(0, self._shapes[need.parameter][1]) and not need.transposed
        is_as_stored = index[need.rectangle.source].dtype == self._dtype
        return is_wide and is_as_stored and need.rows.start % panel_rows() == 0

    def _empty(self, name: str) -> torch.Tensor:
        dtype, shape = torch.float32 if is_norm(name) else self._dtype, self._shapes[name]
        if self._device.type == "cpu":
            return (fresh_zeros if is_factor(name, len(shape)) else lasting_zeros)(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self._device)


def load_seat(
    world: World,
    index: CheckpointIndex,
    table: ParameterTable,
    seats: Mapping[int, Seat],
    dtype: torch.dtype,
    held: HeldParameters,
    device: torch.device = _CPU,
) -> None:
    """Load this rank's parameters into `held`, straight to its `device`, norms in float32, the rest in `dtype`.

    Collective over all the ranks of the plan. Peak memory is what is held, bounded read buffers, and where rows cannot
    be packed as they come a parameter, or with replicas a few and one piece that is passed on.

    Raises:
        CheckpointError: a weight file ends early or cannot be read.
    """
    seat = seats[world.rank]
    arriving = _Arriving(table, seat, dtype, device, held)
    mine = list(seat_needs(table, seat))
    has_replicas = any(other.replica != seat.replica for other in seats.values())
    with SliceReader(torch.get_num_threads()) as reader:
        if has_replicas:
            needs = {rank: [need.rectangle for need in seat_needs(table, other)] for rank, other in seats.items()}
            _load_shared(world, index, arriving, mine, cut_pieces(needs), reader)
            return
        for _, group in groupby(mine, key=lambda need: need.parameter):
            parts = list(group)
            panels = arriving.panels(parts, index)
            if panels is None:
                _load_whole(arriving, parts, index, reader)
            else:
                for need in parts:
                    _pack_rows(panels, need, index, reader)


def _load_whole(arriving: _Arriving, needs: Sequence[Need], index: CheckpointIndex, reader: SliceReader) -> None:
    for need in needs:
        arriving.expect(need, 1)
    for need in needs:
        rectangle = need.rectangle
        target = arriving.target(need, rectangle)
        reader.read(index[rectangle.source], rectangle.rows, rectangle.columns, target)
        arriving.filled(need)


def _pack_rows(panels: PanelWeight, need: Need, index: CheckpointIndex, reader: SliceReader) -> None:
    stored, rectangle, first = index[need.rectangle.source], need.rectangle, need.rows.start
    assert rectangle.columns is not None  # of a matrix
    of_panel = stored.shape[1] * stored.dtype.itemsize * panels.panel_rows
    step = max(1, _PIECE_BYTES // of_panel) * panels.panel_rows
    reader.read_rows(stored, rectangle.rows, rectangle.columns, step, lambda row, rows: panels.pack(first + row, rows))


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
