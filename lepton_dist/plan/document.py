"""Plans as YAML: reading with errors that name file, line, key and both numbers, and writing back."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from lepton_dist.documents import Document, parse_yaml, read_yaml
from lepton_dist.plan.plan import (
    BALANCER_POLICIES,
    DEVICE_KINDS,
    DeviceKind,
    EngineLimits,
    Mesh,
    Plan,
    Precision,
    Replica,
    Stage,
)
from lepton_dist.plan.precision import QUANTIZED
from lepton_dist.values import FLOATS, checked_seconds

DTYPES = FLOATS
WIRES = (*DTYPES, "int8")
_KEYS = ("mesh", "replicas", "device", "ranks_per_gpu", "precision", "engine", "estimate", "cluster")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B)?\s*")
_MOST = 2**31 - 1  # of anything that is counted
_LEAST_SHARE = 1e-6
_UNIT = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Raises:
        ConfigError: the file is no YAML, or a key is unknown, missing, of the wrong type or out of range.
    """
    return plan_from_document(read_yaml(Path(path)))


def parse_plan(text: str, source: str = "plan") -> Plan:
    """Read a plan from YAML text; `source` is the name that errors show."""
    return plan_from_document(parse_yaml(text, source))


def plan_from_document(document: Document) -> Plan:
    """Check and type the values of a parsed plan file."""
    values = _mapping(document, document.values if document.values is not None else {}, "")
    _known(document, values, "", _KEYS)
    if "mesh" in values and "replicas" in values:
        raise document.error("replicas", "give either `mesh` or `replicas`, not both")
    is_auto = values.get("mesh") == "auto"
    return Plan(
        mesh=_mesh(document, values["mesh"]) if "mesh" in values and not is_auto else None,
        replicas=_replicas(document, values["replicas"]) if "replicas" in values else (),
        precision=_precision(document, values.get("precision", {})),
        engine=_engine(document, values.get("engine", {})),
        estimate=_mapping(document, values.get("estimate", {}), "estimate"),
        is_auto=is_auto,
        cluster=_cluster(document, values["cluster"]) if values.get("cluster") is not None else None,
        device=_device(document, values["device"], "device") if "device" in values else Plan.device,
        ranks_per_gpu=_integer(document, values.get("ranks_per_gpu", Plan.ranks_per_gpu), "ranks_per_gpu", least=1),
    )


def plan_to_yaml(plan: Plan) -> str:
    """The plan as YAML text that `parse_plan` reads back to an equal plan."""
    values: dict[str, Any] = {}
    if plan.is_auto:
        values["mesh"] = "auto"
    elif plan.mesh is not None:
        values["mesh"] = {"dp": plan.mesh.dp, "pp": plan.mesh.pp, "tp": plan.mesh.tp}
    elif plan.replicas:
        values["replicas"] = [
            {"stages": [_stage_values(stage) for stage in replica.stages]} for replica in plan.replicas
        ]
    if plan.device != Plan.device:
        values["device"] = plan.device
    if plan.ranks_per_gpu != Plan.ranks_per_gpu:
        values["ranks_per_gpu"] = plan.ranks_per_gpu
    precision = {f.name: getattr(plan.precision, f.name) for f in fields(Precision) if getattr(plan.precision, f.name)}
    if precision:
        values["precision"] = precision
    default = EngineLimits()
    engine = {f.name: getattr(plan.engine, f.name) for f in fields(EngineLimits)}
    changed = {name: value for name, value in engine.items() if value != getattr(default, name)}
    if changed:
        values["engine"] = changed
    if plan.cluster is not None:
        values["cluster"] = plan.cluster
    if plan.estimate:
        values["estimate"] = dict(plan.estimate)
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)


def _stage_values(stage: Stage) -> dict[str, Any]:
    values: dict[str, Any] = {"ranks": list(stage.ranks)}
    if stage.layers:
        values["layers"] = stage.layers
    if len(set(stage.shares)) > 1:
        values["shares"] = [int(share) if share == int(share) else share for share in stage.shares]
    if stage.device is not None:
        values["device"] = stage.device
    return values


def parse_bytes(value: Any) -> int:
    """``4GiB``, ``500 MB`` or a plain number of bytes.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is no size: write a number of bytes, or one with KiB, MiB, GiB, TiB")
    return int(float(match[1]) * _UNIT[match[2] or "B"])


def _mapping(document: Document, value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise document.error(key, f"must be a mapping of keys to values, not {type(value).__name__}")
    return value


def _known(document: Document, values: dict[str, Any], key: str, allowed: tuple[str, ...]) -> None:
    for name in values:
        if name not in allowed:
            path = f"{key}.{name}" if key else name
            raise document.error(path, f"is no key of a plan here; known: {', '.join(allowed)}")


def _integer(document: Document, value: Any, key: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise document.error(key, f"must be a whole number of at least {least}, not {value!r}")
    if value > _MOST:
        raise document.error(key, f"must be at most {_MOST}")
    return value


def _mesh(document: Document, value: Any) -> Mesh:
    values = _mapping(document, value, "mesh")
    _known(document, values, "mesh", ("dp", "pp", "tp"))
    return Mesh(**{name: _integer(document, size, f"mesh.{name}", least=1) for name, size in values.items()})


def _cluster(document: Document, value: Any) -> str:
    """A path as seen from where the job was started; in the plan it is relative to the plan's own file."""
    if not isinstance(value, str) or not value:
        raise document.error("cluster", f"must be the path of a cluster file, not {value!r}")
    return str(Path(document.source).parent / value)


def _replicas(document: Document, value: Any) -> tuple[Replica, ...]:
    if not isinstance(value, list) or not value:
        raise document.error("replicas", "must be a list of at least one replica")
    return tuple(_replica(document, item, f"replicas[{index}]") for index, item in enumerate(value))


def _replica(document: Document, value: Any, key: str) -> Replica:
    values = _mapping(document, value, key)
    _known(document, values, key, ("stages",))
    stages = values.get("stages")
    if not isinstance(stages, list) or not stages:
        raise document.error(f"{key}.stages", "must be a list of at least one stage")
    return Replica(tuple(_stage(document, item, f"{key}.stages[{index}]") for index, item in enumerate(stages)))


def _stage(document: Document, value: Any, key: str) -> Stage:
    values = _mapping(document, value, key)
    _known(document, values, key, ("ranks", "layers", "shares", "device"))
    ranks = values.get("ranks")
    if not isinstance(ranks, list) or not ranks:
        raise document.error(f"{key}.ranks", "must be a list of at least one rank")
    members = tuple(_integer(document, rank, f"{key}.ranks[{i}]", least=0) for i, rank in enumerate(ranks))
    layers = _integer(document, values["layers"], f"{key}.layers", least=1) if "layers" in values else 0
    shares = values.get("shares", [1] * len(members))
    if not isinstance(shares, list) or len(shares) != len(members):
        count = len(shares) if isinstance(shares, list) else shares
        raise document.error(f"{key}.shares", f"{count} shares for {len(members)} ranks: give one for each rank")
    for index, share in enumerate(shares):
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or not _LEAST_SHARE <= share <= 1 / _LEAST_SHARE:
            allowed = f"must be a number above 0, from {_LEAST_SHARE:g} to {1 / _LEAST_SHARE:g}"
            raise document.error(f"{key}.shares[{index}]", f"{allowed}, not {share!r}")
    device = _device(document, values["device"], f"{key}.device") if "device" in values else None
    return Stage(members, layers, tuple(float(share) for share in shares), device=device)


def _device(document: Document, value: Any, key: str) -> DeviceKind:
    if value not in DEVICE_KINDS:
        raise document.error(key, f"{value!r} is no device; known: {', '.join(DEVICE_KINDS)}")
    kind: DeviceKind = value
    return kind


def _precision(document: Document, value: Any) -> Precision:
    values = _mapping(document, value, "precision")
    _known(document, values, "precision", tuple(f.name for f in fields(Precision)))
    for name, dtype in values.items():
        known = {"wire": WIRES, "weights": (*DTYPES, *QUANTIZED)}.get(name, DTYPES)
        if dtype not in known:
            raise document.error(f"precision.{name}", f"{dtype!r} is not supported; known: {', '.join(known)}")
    return Precision(**values)


def _engine(document: Document, value: Any) -> EngineLimits:
    values = dict(_mapping(document, value, "engine"))
    _known(document, values, "engine", tuple(f.name for f in fields(EngineLimits)))
    for name, setting in values.items():
        key = f"engine.{name}"
        if name in ("prefix_cache", "overlap"):
            if not isinstance(setting, bool):
                raise document.error(key, f"must be true or false, not {setting!r}")
        elif name == "balancer":
            if setting not in BALANCER_POLICIES:
                raise document.error(key, f"{setting!r} is unknown; known: {', '.join(BALANCER_POLICIES)}")
        elif name.endswith("_timeout_s"):
            try:
                checked_seconds(name, setting, is_zero_allowed=False)
            except ValueError as error:
                raise document.error(key, str(error)) from None
        elif setting == "auto" and name in ("max_batch_tokens", "kv_cache_bytes", "context_tokens"):
            continue
        elif name == "kv_cache_bytes":
            values[name] = _bytes(document, setting, key)
        else:
            _integer(document, setting, key, least=1)
    return EngineLimits(**values)


def _bytes(document: Document, value: Any, key: str) -> int:
    try:
        size = parse_bytes(value)
    except ValueError as error:
        raise document.error(key, str(error)) from None
    if size < 1:
        raise document.error(key, f"must be at least 1 byte, not {size}")
    return size
