"""What can begin while torch is still being imported: the memory for this rank's weights is touched. Without torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lepton_dist.comm.launcher import read_launcher
from lepton_dist.config.machine import available_bytes
from lepton_dist.errors import LeptonError
from lepton_dist.kernels.cpu.reserve import reserve
from lepton_dist.model.fields import ConfigFields
from lepton_dist.plan.document import load_plan
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import INT4_GROUPS, decide_dtypes

_STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HELD_BYTES = {"bfloat16": 2.0, "int8": 1.0, **{kind: 0.5 + 2 / group for kind, group in INT4_GROUPS.items()}}
"""Of a weight, by the kinds that are packed."""
_MOST = 0.5  # of the memory that this rank may use: a guess must not be what it lacks


def touch_ahead(model: str, plan_path: str | None, dtype: str | None) -> None:
    """Touch about as much memory as this rank's weights will take.

    A guess, for which nothing is checked: what is wrong with the model or the plan is found and told by those who read
    them; what is too much is given back when the weights are there.
    """
    launcher = read_launcher()
    if launcher.size == 0 or find_spec("lepton_dist.kernels.cpu._native") is None:
        return
    try:
        plan = load_plan(plan_path) if plan_path is not None else Plan()
        wanted = _share_bytes(Path(model), plan, dtype, launcher.rank, launcher.size)
    except (LeptonError, OSError):
        return
    reserve().begin(min(wanted, int(_MOST * available_bytes(max(launcher.local_size, 1)))))


def _share_bytes(model: Path, plan: Plan, dtype: str | None, rank: int, size: int) -> int:
    """A rank's part of the weights, if they are packed; 0 where the plan is yet to be found, or has GPUs."""
    if plan.is_auto or plan.device != "cpu" or plan.wants_gpus:
        return 0
    stored = ConfigFields.read(model).dtype()
    kind = decide_dtypes(plan.precision, dtype, stored).weights
    held = sum(file.stat().st_size for file in model.glob("*.safetensors")) / _STORED_BYTES[stored]
    return int(held * _HELD_BYTES.get(kind, 0.0) * _share(plan, rank, size))


def _share(plan: Plan, rank: int, size: int) -> float:
    """A rank's part of a model, as if its replica's ranks held equal ones."""
    if plan.mesh is not None:
        return 1 / (plan.mesh.pp * plan.mesh.tp)
    if not plan.replicas:
        return 1 / size
    return next((1 / len(replica.ranks) for replica in plan.replicas if rank in replica.ranks), 0.0)
