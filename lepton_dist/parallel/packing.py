"""The matrices of a seat that are packed as they are read: which those are, and how they come here. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lepton_dist.kernels.cpu.native import KINDS
from lepton_dist.kernels.cpu.panels import Panels, panel_bytes, panel_kind, panel_rows
from lepton_dist.model.parameters import ParameterTable, is_factor, matrix_kind
from lepton_dist.parallel.requirements import Need, seat_needs
from lepton_dist.plan.axes import Span
from lepton_dist.plan.placement import Seat
from lepton_dist.plan.precision import Dtypes
from lepton_dist.storage.index import CheckpointIndex
from lepton_dist.storage.row_loading import RowLoading, RowRun


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [out, in] of a seat, the kind of panels that it becomes, and what is read for it."""

    name: str
    out_features: int
    in_features: int
    kind: str
    runs: tuple[RowRun, ...]

    @property
    def num_bytes(self) -> int:
        """What it takes as panels."""
        return panel_bytes(self.kind, self.out_features, self.in_features)


def packed_matrices(
    index: CheckpointIndex, table: ParameterTable, seat: Seat, dtypes: Dtypes
) -> tuple[PackedMatrix, ...]:
    """What a seat on a CPU can pack row by row: whole rows, stored in the dtype that is computed in."""
    shapes = {one.name: one.local_shape(seat.spans) for one in table.of_stage(seat.layers)}
    found = []
    for name, group in groupby(seat_needs(table, seat), key=lambda need: need.parameter):
        shape, needs = shapes[name], list(group)
        kind = panel_kind(dtypes.compute, matrix_kind(name, dtypes.weights)) if is_factor(name, len(shape)) else None
        if kind is not None and all(_is_of_whole_rows(need, shape[1], dtypes.compute, index) for need in needs):
            found.append(PackedMatrix(name, shape[0], shape[1], kind, tuple(_run(need, index) for need in needs)))
    return tuple(found)


def _is_of_whole_rows(need: Need, width: int, compute: str, index: CheckpointIndex) -> bool:
    """Whether a need fills whole rows of its parameter, as they are stored, from the first of a panel on."""
    stored = index[need.rectangle.source].dtype
    is_wide = need.columns == Span(0, width) and not need.transposed
    return is_wide and stored == compute and stored in KINDS and need.rows.start % panel_rows() == 0


def _run(need: Need, index: CheckpointIndex) -> RowRun:
    rectangle = need.rectangle
    assert rectangle.columns is not None  # of a matrix
    return RowRun(index[rectangle.source], rectangle.rows, rectangle.columns, need.rows.start)


class Packing:
    """Matrices on their way into panels; close it.

    Raises:
        CheckpointError: a weight file cannot be opened.
    """

    def __init__(self, matrices: Sequence[PackedMatrix]) -> None:
        self.matrices = tuple(matrices)
        self._panels = {one.name: Panels(one.out_features, one.in_features, one.kind) for one in matrices}
        self._rows = RowLoading([(run, self._panels[one.name]) for one in matrices for run in one.runs])

    @property
    def held_bytes(self) -> int:
        """Memory that the panels take by now, about."""
        return int(self._rows.done * sum(one.num_bytes for one in self.matrices))

    def begin(self) -> None:
        """Begin in a thread of its own."""
        self._rows.begin()

    def finish(self, threads: int) -> dict[str, Panels]:
        """The panels by name, filled.

        Raises:
            CheckpointError: a weight file ends early or cannot be read.
        """
        self._rows.finish(threads)
        return self._panels

    def close(self) -> None:
        """Stop, whatever is left."""
        self._rows.close()
