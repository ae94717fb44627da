"""What can begin while torch is still being imported: this rank's matrices are read and packed. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from lepton_dist.comm.launcher import Launcher, read_launcher
from lepton_dist.config.machine import available_bytes
from lepton_dist.errors import LeptonError
from lepton_dist.parallel.checkpoint import Checkpoint
from lepton_dist.parallel.packing import PackedMatrix, Packing, packed_matrices
from lepton_dist.plan.document import load_plan
from lepton_dist.plan.placement import has_replicas
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.blueprint import Blueprint

_MOST_OPENED = 1024  # files, by all ranks together, before a checkpoint's headers are read by one rank for all
_MOST = 0.5  # of the memory that this rank may use: nobody has checked yet that weights and KV cache fit


class HeadStart:
    """What was begun, until somebody takes it."""

    def __init__(self) -> None:
        self._packing: Packing | None = None
        self._read: tuple[str, Checkpoint] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether there is something to take."""
        return self._packing is not None

    @property
    def held_bytes(self) -> int:
        """Memory that weights take already."""
        return 0 if self._packing is None else self._packing.held_bytes

    def begin(self, model: str, plan_path: str | None, dtype: str | None) -> None:
        """Begin to load what this rank will hold, as far as that can be told without the other ranks.

        Nothing is checked for others: what is wrong with the model or the plan is found and told by those who load it.
        """
        launcher = read_launcher()
        try:
            matrices = self._matrices(model, plan_path, dtype, launcher)
            most = _MOST * available_bytes(max(launcher.local_size, 1))
            if matrices and sum(one.num_bytes for one in matrices) <= most:
                self._packing = Packing(matrices)
                self._packing.begin()
        except (LeptonError, OSError):
            return

    def take(self) -> Packing | None:
        """What was begun, once; close it."""
        packing, self._packing = self._packing, None
        return packing

    def take_checkpoint(self, model: str) -> Checkpoint | None:
        """What was read of this model, once."""
        read, self._read = self._read, None
        return read[1] if read is not None and read[0] == model else None

    def close(self) -> None:
        """Stop what nobody took."""
        packing = self.take()
        if packing is not None:
            packing.close()

    def _matrices(
        self, model: str, plan_path: str | None, dtype: str | None, launcher: Launcher
    ) -> tuple[PackedMatrix, ...]:
        """What this rank packs; nothing where only the ranks together can tell, or where GPUs or replicas take part."""
        plan = load_plan(plan_path) if plan_path is not None else Plan()
        is_open = not plan.has_layout and launcher.size != max(launcher.local_size, 1)  # which ranks share a node
        if launcher.size == 0 or plan.is_auto or is_open or _is_costly(model, launcher):
            return ()
        checkpoint = Checkpoint.read(model)
        self._read = model, checkpoint
        blueprint = Blueprint.draw(model, plan.laid_out([0] * launcher.size), launcher.size, checkpoint)
        seat = blueprint.seats.get(launcher.rank)
        if seat is None or blueprint.plan.wants_gpus or has_replicas(blueprint.seats):
            return ()
        dtypes = decide_dtypes(plan.precision, dtype, blueprint.config.dtype)
        return packed_matrices(blueprint.index, blueprint.table, seat, dtypes)


@cache
def head_start() -> HeadStart:
    """That of this process; empty until something is begun."""
    return HeadStart()


@contextmanager
def loading_ahead(model: str, plan_path: str | None, dtype: str | None) -> Iterator[bool]:
    """Begin to load, and say whether there was anything: on CPUs, then. At the end nothing of it goes on."""
    head_start().begin(model, plan_path, dtype)
    try:
        yield head_start().has_begun
    finally:
        head_start().close()


def _is_costly(model: str, launcher: Launcher) -> bool:
    """Whether so many ranks on several nodes would open so many files that one should read for all."""
    is_spread = launcher.size != max(launcher.local_size, 1)
    return is_spread and launcher.size * sum(1 for _ in Path(model).glob("*.safetensors")) > _MOST_OPENED
