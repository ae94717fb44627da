"""Settings to compare, by name: ``tp2``, ``pp2+float32``, ``dp2+tp2+int8``, ``plan`` and their like."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from lepton_dist.errors import UsageError
from lepton_dist.plan.document import parse_plan, plan_to_yaml
from lepton_dist.plan.plan import Mesh, Plan, Precision, Replica, Stage
from lepton_dist.plan.precision import QUANTIZED

_AXIS = re.compile(r"(dp|pp|tp)([1-9][0-9]*)")
_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}
_WIRES = {"wire-int8": "int8", "wire-bf16": "bfloat16", "wire-fp32": "float32"}
_NO_OVERLAP = "no-overlap"
_KNOWN = ", ".join(("plan", "plain", "tpN", "ppN", "dpN", "bf16", "fp32", *QUANTIZED, *_WIRES, _NO_OVERLAP))


@dataclass(frozen=True)
class Setting:
    """One column of a comparison: `plan` None is the plan that was given, or the default one; so is each precision."""

    name: str
    plan: Plan | None
    precision: Precision
    overlaps: bool = True

    def over(self, given: Plan) -> Plan:
        """The plan to run, where `given` is the one that a setting without a mesh takes.

        Raises:
            ConfigError: this version does not have the precision.
        """
        plan = self.plan or given
        asked = {f.name: value for f in fields(Precision) if (value := getattr(self.precision, f.name))}
        engine = plan.engine if self.overlaps else replace(plan.engine, overlap=False)
        plan = replace(plan, precision=replace(plan.precision, **asked), engine=engine)
        return parse_plan(plan_to_yaml(plan), f"--compare {self.name}")


def parse_setting(text: str, world_size: int) -> Setting:
    """A setting from its name. A mesh smaller than the job uses the first ranks; ``plain`` is rank 0 alone.

    Raises:
        UsageError: a word is unknown, or the mesh needs more ranks than the job has.
    """
    axes: dict[str, int] = {}
    precision = Precision()
    uses_plan, overlaps = False, True
    for word in sorted(text.split("+"), key=lambda word: word not in _DTYPES):  # a dtype first: it sets all three
        match = _AXIS.fullmatch(word)
        if match is not None:
            axes[match[1]] = int(match[2])
        elif word in _DTYPES:
            precision = Precision(*[_DTYPES[word]] * len(fields(Precision)))
        elif word in QUANTIZED:
            precision = replace(precision, weights=word)
        elif word in _WIRES:
            precision = replace(precision, wire=_WIRES[word])
        elif word == _NO_OVERLAP:
            overlaps = False
        elif word == "plan":
            uses_plan = True
        elif word == "plain":
            axes.setdefault("tp", 1)
        else:
            raise UsageError(f"--compare {text}: {word!r} is unknown; known: {_KNOWN}")
    if uses_plan or not axes:
        return Setting(text, None, precision, overlaps)
    mesh = Mesh(**axes)
    if mesh.size > world_size:
        raise UsageError(f"--compare {text}: needs {mesh.size} ranks, the job has {world_size}")
    return Setting(text, _on_first_ranks(mesh), precision, overlaps)


def _on_first_ranks(mesh: Mesh) -> Plan:
    ranks = iter(range(mesh.size))
    return Plan(
        replicas=tuple(
            Replica(tuple(Stage(tuple(next(ranks) for _ in range(mesh.tp))) for _ in range(mesh.pp)))
            for _ in range(mesh.dp)
        )
    )
