"""Which rectangles of the checkpoint a seat needs, and a check that the checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from lepton_dist.errors import CheckpointError
from lepton_dist.kernels.cpu.panels import matrix_bytes
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.family import Family
from lepton_dist.model.parameters import Parameter, ParameterTable, Part, is_factor, local_spans, matrix_kind
from lepton_dist.plan.axes import Axis, Span, span_size
from lepton_dist.plan.placement import Seat
from lepton_dist.plan.precision import QUANTIZED, Dtypes
from lepton_dist.storage.distribution import Rectangle
from lepton_dist.storage.index import CheckpointIndex
from lepton_dist.values import FLOAT_BYTES


@dataclass(frozen=True)
class Need:
    """A rectangle of a stored tensor and where it goes: rows and columns of the parameter, perhaps transposed."""

    rectangle: Rectangle
    parameter: str
    rows: Span
    columns: Span | None
    transposed: bool


def name_prefix(index: CheckpointIndex, family: Family) -> str:
    """What this checkpoint's names begin with, of what the family allows."""
    probe = family.sources["attention_norm"].name.format(i=0) + ".weight"
    return next((prefix for prefix in family.prefixes if prefix + probe in index), family.prefixes[0])


def parameter_table(index: CheckpointIndex, config: ModelConfig, family: Family) -> ParameterTable:
    """The model's parameters under the name prefix that this checkpoint uses.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or a dtype that is no float.
    """
    table = ParameterTable(config, family, name_prefix(index, family))
    for parameter in table.of_stage(range(config.shape.num_layers)):
        for part in parameter.parts:
            _check(index, part)
    return table


def _check(index: CheckpointIndex, part: Part) -> None:
    stored = index[part.tensor]
    if stored.shape != part.stored_shape:
        raise CheckpointError(
            f"{stored.file}: {part.tensor!r} has the shape {list(stored.shape)}, "
            f"config.json asks for {list(part.stored_shape)}"
        )
    if stored.dtype not in ("float64", *FLOAT_BYTES):
        raise CheckpointError(
            f"{stored.file}: {part.tensor!r} is {stored.dtype}: float32, bfloat16 or float16 is needed"
        )


def seat_needs(table: ParameterTable, seat: Seat) -> Iterator[Need]:
    """Everything that a seat loads, in the order of its parameters."""
    for parameter in table.of_stage(seat.layers):
        row = 0
        for part in parameter.parts:
            for need in _part_needs(parameter, part, seat, row):
                yield need
                row = need.rows.stop


def _part_needs(parameter: Parameter, part: Part, seat: Seat, row: int) -> Iterator[Need]:
    offset = part.source.section * part.extents[0]
    for rows in local_spans(part, 0, seat.spans):
        stored_rows = Span(rows.start + offset, rows.stop + offset)
        target_rows = Span(row, row + rows.size)
        row += rows.size
        if len(part.axes) == 1:
            yield Need(Rectangle(part.tensor, stored_rows, None), parameter.name, target_rows, None, False)
            continue
        column = 0
        for columns in local_spans(part, 1, seat.spans):
            is_transposed = part.source.transposed
            stored = (columns, stored_rows) if is_transposed else (stored_rows, columns)
            target = Span(column, column + columns.size)
            column += columns.size
            yield Need(Rectangle(part.tensor, *stored), parameter.name, target_rows, target, is_transposed)


def weight_bytes(table: ParameterTable, seat: Seat, dtypes: Dtypes) -> int:
    """Bytes of a seat's weights; norms, and biases of norms, are held in float32."""
    total = 0
    for parameter in table.of_stage(seat.layers):
        name, shape = parameter.name, parameter.local_shape(seat.spans)
        if is_norm(name):
            total += 4 * prod(shape)
        elif is_factor(name, len(shape)):
            total += matrix_bytes(matrix_kind(name, dtypes.weights), *shape)
        else:
            total += matrix_bytes(dtypes.compute, prod(shape), 1)
    if table.config.is_tied and seat.is_first and seat.is_last and dtypes.weights in QUANTIZED:
        # The embedding is looked up as it is, and multiplied with as a head that is rounded.
        rows = span_size(seat.spans[Axis.VOCAB])
        total += matrix_bytes(matrix_kind("head.weight", dtypes.weights), rows, table.config.shape.hidden)
    return total


def num_weights(table: ParameterTable, seat: Seat) -> int:
    """Numbers in a seat's weights."""
    return sum(prod(parameter.local_shape(seat.spans)) for parameter in table.of_stage(seat.layers))


def is_norm(name: str) -> bool:
    """Whether a parameter belongs to a norm, which is computed in float32."""
    return name.rsplit(".", 2)[-2].endswith("norm")


def kv_heads_of(seat: Seat) -> int:
    """KV heads that a seat holds, counted with their copies."""
    return sum(span.size for span in seat.spans[Axis.KV_HEADS])
