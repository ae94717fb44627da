"""Which transport and algorithm carry an operation of so many bytes: a table, and rules to fill it. Pure.

Sizes fall into buckets, one for each power of two. A table built from measurements must be the same on every rank,
so the measurements are reduced before they come here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier")

# Up to these sizes one round in which everyone reads everything beats two rounds over parts; used until measured.
FLAT_LIMIT_BYTES = 64 << 10
GATHER_LIMIT_BYTES = 16 << 10

LAST_BUCKET = 62  # holds every size that a tensor can have


@dataclass(frozen=True)
class Choice:
    """How one collective is carried. `algorithm` is ``direct`` where the transport has only one."""

    transport: str
    algorithm: str = "direct"


@dataclass(frozen=True)
class Timing:
    """One measurement: the slowest rank's median seconds of one operation of `num_bytes`."""

    operation: str
    num_bytes: int
    choice: Choice
    seconds: float


def bucket(num_bytes: int) -> int:
    """The bucket of a size: b holds the sizes above 2**(b-1) and up to 2**b bytes."""
    return max(num_bytes - 1, 0).bit_length()


@dataclass(frozen=True)
class Table:
    """Choices by operation and upper bucket; the last bucket of each operation is `LAST_BUCKET`."""

    rows: Mapping[str, tuple[tuple[int, Choice], ...]]

    def choose(self, operation: str, num_bytes: int) -> Choice:
        """The choice for one call.

        Raises:
            KeyError: the table has no row for this operation.
        """
        wanted = bucket(num_bytes)
        return next(choice for limit, choice in self.rows[operation] if wanted <= limit)

    def lines(self) -> list[str]:
        """The table in words, one line a step, for `doctor`."""
        return [
            f"{operation} {'beyond' if limit == LAST_BUCKET else f'up to {1 << limit} bytes'}: "
            f"{choice.transport}, {choice.algorithm}"
            for operation, steps in self.rows.items()
            for limit, choice in steps
        ]


def default_table(transports: Iterable[str]) -> Table:
    """The table before anything is measured: the nearest transport carries everything.

    `transports` are names out of ``shm``, ``mpi``, ``local``.
    """
    available = set(transports)
    nearest = next(name for name in ("local", "shm", "mpi") if name in available)
    rows: dict[str, tuple[tuple[int, Choice], ...]] = {
        operation: ((LAST_BUCKET, Choice(nearest)),) for operation in OPERATIONS
    }
    if nearest == "shm":
        rows["all_reduce"] = _two_steps(FLAT_LIMIT_BYTES, Choice("shm", "flat"), Choice("shm", "two_phase"))
    if nearest == "mpi":
        rows["all_reduce"] = _two_steps(GATHER_LIMIT_BYTES, Choice("mpi", "gather"), Choice("mpi", "exchange"))
    return Table(rows)


def measured_table(base: Table, timings: Iterable[Timing]) -> Table:
    """`base` with the operations that were measured replaced by the fastest choice of each bucket.

    A bucket without a measurement takes the choice of the next larger one that has it; beyond the largest, `base`
    decides. Equal times go to the choice whose names come first, so that every rank decides alike.
    """
    best: dict[str, dict[int, Timing]] = {}
    for timing in timings:
        buckets = best.setdefault(timing.operation, {})
        known = buckets.get(bucket(timing.num_bytes))
        if known is None or _order(timing) < _order(known):
            buckets[bucket(timing.num_bytes)] = timing
    rows = dict(base.rows)
    for operation, buckets in best.items():
        steps: list[tuple[int, Choice]] = []
        for limit in sorted(buckets):
            choice = buckets[limit].choice
            if steps and steps[-1][1] == choice:
                steps.pop()
            steps.append((limit, choice))
        rest = [step for step in base.rows[operation] if step[0] > steps[-1][0]]
        rows[operation] = (*steps, *rest)
    return Table(rows)


def _order(timing: Timing) -> tuple[float, str, str]:
    return timing.seconds, timing.choice.transport, timing.choice.algorithm


def _two_steps(limit_bytes: int, small: Choice, large: Choice) -> tuple[tuple[int, Choice], ...]:
    return (bucket(limit_bytes), small), (LAST_BUCKET, large)
