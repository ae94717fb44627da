"""What each rank of a plan would hold of a model, told without starting MPI or reading a weight."""

from __future__ import annotations

import torch

from lepton_dist.parallel.requirements import kv_heads_of, weight_bytes
from lepton_dist.plan.axes import Axis, span_size
from lepton_dist.plan.placement import Seat
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import Dtypes
from lepton_dist.runtime.blueprint import Blueprint

_HEADINGS = (
    "rank",
    "replica",
    "stage",
    "layers",
    "heads",
    "kv heads",
    "ffn",
    "vocab",
    "weights MiB",
    "KV MiB",
    "KV tokens",
)


def world_size_of(plan: Plan) -> int:
    """The smallest world that a plan can run on."""
    return plan.mesh.size if plan.mesh is not None else max(plan.ranks, default=0) + 1


def seat_table(blueprint: Blueprint, dtypes: Dtypes) -> str:
    """A table of what each rank holds.

    The KV cache is what `kv_cache_bytes` says, or, for ``auto``, what `max_sequences` at the full context need: a run
    takes that, or half of the rank's memory when that is less.
    """
    rows = [_row(blueprint, dtypes, seat) for _, seat in sorted(blueprint.seats.items())]
    widths = [max(len(row[i]) for row in (_HEADINGS, *rows)) for i in range(len(_HEADINGS))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (_HEADINGS, *rows)
    ]
    return "\n".join(lines)


def _row(blueprint: Blueprint, dtypes: Dtypes, seat: Seat) -> tuple[str, ...]:
    kv_dtype: torch.dtype = getattr(torch, dtypes.kv_cache)
    geometry = blueprint.geometry(seat, kv_dtype)
    asked = blueprint.limits.kv_cache_bytes
    blocks = blueprint.most_blocks()
    if asked != "auto":
        blocks = min(blocks, asked // geometry.block_bytes)
    weights = weight_bytes(blueprint.table, seat, dtypes)
    ends = seat.is_first or seat.is_last
    return (
        str(seat.rank),
        str(seat.replica),
        str(seat.stage),
        f"{seat.layers.start}-{seat.layers.stop - 1}",
        str(span_size(seat.spans[Axis.HEADS])),
        str(kv_heads_of(seat)),
        str(span_size(seat.spans[Axis.FFN])),
        str(span_size(seat.spans[Axis.VOCAB])) if ends else "-",
        f"{weights / 2**20:.1f}",
        f"{blocks * geometry.block_bytes / 2**20:.1f}",
        str(blocks * geometry.block_tokens),
    )
