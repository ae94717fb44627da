"""Settings to compare, by name: ``tp2``, ``pp2+float32``, ``dp2+tp2``, ``plan`` and their like."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lepton_dist.errors import UsageError
from lepton_dist.plan.plan import Mesh, Plan, Replica, Stage

_AXIS = re.compile(r"(dp|pp|tp)([1-9][0-9]*)")
_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}


@dataclass(frozen=True)
class Setting:
    """One column of a comparison: `plan` None is the plan that was given, or the default one."""

    name: str
    plan: Plan | None
    dtype: str | None


def parse_setting(text: str, world_size: int) -> Setting:
    """A setting from its name. A mesh smaller than the job uses the first ranks; ``plain`` is rank 0 alone.

    Raises:
        UsageError: a word is unknown, or the mesh needs more ranks than the job has.
    """
    axes: dict[str, int] = {}
    dtype = None
    uses_plan = False
    for word in text.split("+"):
        match = _AXIS.fullmatch(word)
        if match is not None:
            axes[match[1]] = int(match[2])
        elif word in _DTYPES:
            dtype = _DTYPES[word]
        elif word == "plan":
            uses_plan = True
        elif word == "plain":
            axes.setdefault("tp", 1)
        else:
            raise UsageError(f"--compare {text}: {word!r} is unknown; known: plan, plain, tpN, ppN, dpN, bf16, fp32")
    if uses_plan or not axes:
        return Setting(text, None, dtype)
    mesh = Mesh(**axes)
    if mesh.size > world_size:
        raise UsageError(f"--compare {text}: needs {mesh.size} ranks, the job has {world_size}")
    return Setting(text, _on_first_ranks(mesh), dtype)


def _on_first_ranks(mesh: Mesh) -> Plan:
    ranks = iter(range(mesh.size))
    return Plan(
        replicas=tuple(
            Replica(tuple(Stage(tuple(next(ranks) for _ in range(mesh.tp))) for _ in range(mesh.pp)))
            for _ in range(mesh.dp)
        )
    )
