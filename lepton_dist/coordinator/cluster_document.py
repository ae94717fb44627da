"""Cluster files as YAML: ranks that measured alike share a `kind`, so that a thousand ranks stay readable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lepton_dist.coordinator.cluster import AllReduce, Cluster, Curve, Link, Matmul, RankProfile
from lepton_dist.coordinator.ranges import format_ranks, parse_ranks
from lepton_dist.documents import Document, parse_yaml, read_yaml
from lepton_dist.storage.outputs import write_output

_KEYS = ("name", "kinds", "hosts", "links")
_RATES = ("memory_bytes_per_s", "attention_bytes_per_s", "attention_flops_per_s")
_SECONDS = ("step_s", "layer_s", "sequence_s", "kv_head_s", "element_s", "logit_s")
_KIND_KEYS = ("device", "threads", "memory_bytes", *_RATES, *_SECONDS, "matmul_flops_per_s")
_LINKS = ("within_node", "between_nodes", "pairs", "within_reduce", "between_reduce")
_MOST = 2**62  # of anything that is counted: bytes of memory are the largest numbers here
_DIGITS = 4


def read_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Read a cluster file.

    Raises:
        ConfigError: the file is no YAML, or a key is unknown, missing, of the wrong type or out of range.
    """
    return cluster_from_document(read_yaml(Path(path)))


def parse_cluster(text: str, source: str = "cluster") -> Cluster:
    """Read a cluster from YAML text; `source` is the name that errors show."""
    return cluster_from_document(parse_yaml(text, source))


def write_cluster(cluster: Cluster, path: str | os.PathLike[str]) -> None:
    """Write a file that `read_cluster` reads; rates keep four digits. Folders are made.

    Raises:
        OutputError: the file cannot be written.
    """
    write_output(path, cluster_to_yaml(cluster))


def cluster_to_yaml(cluster: Cluster) -> str:
    """The cluster as YAML text."""
    kinds: dict[tuple[Any, ...], str] = {}
    values: dict[str, dict[str, Any]] = {}
    hosts: dict[tuple[str, int, str], list[int]] = {}
    for profile in cluster.ranks:
        kind = kinds.setdefault(profile.kind, f"kind{len(kinds)}")
        values.setdefault(kind, _kind_values(profile))
        hosts.setdefault((profile.host, profile.node, kind), []).append(profile.rank)
    listing = [
        {"host": host, "node": node, "kind": kind, "ranks": format_ranks(ranks)}
        for (host, node, kind), ranks in hosts.items()
    ]
    links: dict[str, Any] = {name: _link_values(getattr(cluster, name)) for name in ("within_node", "between_nodes")}
    if cluster.pairs:
        links["pairs"] = [{"nodes": list(nodes), **_link_values(link)} for nodes, link in sorted(cluster.pairs.items())]
    for name in ("within_reduce", "between_reduce"):
        curve: AllReduce | None = getattr(cluster, name)
        if curve is not None:
            links[name] = {"num_ranks": curve.num_ranks, "seconds": _curve_values(curve.seconds)}
    document = {"name": cluster.name, "kinds": values, "hosts": listing, "links": links}
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=120)


def _kind_values(profile: RankProfile) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(profile, name) for name in ("device", "threads", "memory_bytes")}
    values |= {name: _rounded(getattr(profile, name)) for name in (*_RATES, *_SECONDS)}
    values["matmul_flops_per_s"] = {name: _curve_values(curve) for name, curve in profile.matmul.rates.items()}
    return values


def _link_values(link: Link) -> dict[str, float]:
    return {"latency_s": _rounded(link.latency_s), "bytes_per_s": _rounded(link.bytes_per_s)}


def _curve_values(curve: Curve) -> dict[int, float]:
    return {x: _rounded(y) for x, y in curve}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS - 1}e}")


def cluster_from_document(document: Document) -> Cluster:
    """Check and type the values of a parsed cluster file."""
    values = _mapping(document, document.values, "", _KEYS)
    kinds = {
        name: _kind(document, kind, f"kinds.{name}")
        for name, kind in _mapping(document, values["kinds"], "kinds").items()
    }
    ranks: dict[int, RankProfile] = {}
    for index, entry in enumerate(_list(document, values["hosts"], "hosts")):
        _seat_host(document, entry, f"hosts[{index}]", kinds, ranks)
    for rank in range(len(ranks)):
        if rank not in ranks:
            raise document.error("hosts", f"no host has rank {rank}, but there are {len(ranks)} ranks in all")
    links = _mapping(document, values["links"], "links", _LINKS[:2], _LINKS[2:])
    pairs: dict[tuple[int, int], Link] = {}
    for index, entry in enumerate(_list(document, links.get("pairs", []), "links.pairs", least=0)):
        key = f"links.pairs[{index}]"
        names = _mapping(document, entry, key, ("nodes", "latency_s", "bytes_per_s"))["nodes"]
        if not isinstance(names, list) or len(names) != 2 or not all(isinstance(node, int) for node in names):
            raise document.error(f"{key}.nodes", f"must be two node numbers, not {names!r}")
        pairs[min(names), max(names)] = _link(document, {k: v for k, v in entry.items() if k != "nodes"}, key)
    return Cluster(
        name=str(values["name"]),
        ranks=tuple(ranks[rank] for rank in range(len(ranks))),
        within_node=_link(document, links["within_node"], "links.within_node"),
        between_nodes=_link(document, links["between_nodes"], "links.between_nodes"),
        pairs=pairs,
        within_reduce=_reduce(document, links.get("within_reduce"), "links.within_reduce"),
        between_reduce=_reduce(document, links.get("between_reduce"), "links.between_reduce"),
    )


def _kind(document: Document, value: Any, key: str) -> RankProfile:
    """A rank of this kind that has no place yet."""
    values = _mapping(document, value, key, _KIND_KEYS)
    rates = _mapping(document, values["matmul_flops_per_s"], f"{key}.matmul_flops_per_s")
    curves = {name: _curve(document, curve, f"{key}.matmul_flops_per_s.{name}") for name, curve in rates.items()}
    if not curves:
        raise document.error(f"{key}.matmul_flops_per_s", "needs the rates of one dtype at least")
    numbers = {
        name: _number(document, values[name], f"{key}.{name}", is_rate=name in _RATES) for name in _RATES + _SECONDS
    }
    return RankProfile(
        rank=-1,
        host="",
        node=-1,
        device=str(values["device"]),
        threads=_whole(document, values["threads"], f"{key}.threads", least=1),
        memory_bytes=_whole(document, values["memory_bytes"], f"{key}.memory_bytes", least=1),
        matmul=Matmul(curves),
        **numbers,
    )


def _seat_host(
    document: Document, value: Any, key: str, kinds: Mapping[str, RankProfile], ranks: dict[int, RankProfile]
) -> None:
    entry = _mapping(document, value, key, ("host", "node", "kind", "ranks"))
    if not isinstance(entry["kind"], str) or entry["kind"] not in kinds:
        raise document.error(f"{key}.kind", f"{entry['kind']!r} is not among the kinds: {', '.join(kinds)}")
    node = _whole(document, entry["node"], f"{key}.node", least=0)
    try:
        numbers = parse_ranks(str(entry["ranks"]))
    except ValueError as error:
        raise document.error(f"{key}.ranks", str(error)) from None
    for number in numbers:
        if number in ranks:
            raise document.error(f"{key}.ranks", f"rank {number} is already on host {ranks[number].host!r}")
        ranks[number] = replace(kinds[entry["kind"]], rank=number, host=str(entry["host"]), node=node)


def _link(document: Document, value: Any, key: str) -> Link:
    values = _mapping(document, value, key, ("latency_s", "bytes_per_s"))
    latency_s = _number(document, values["latency_s"], f"{key}.latency_s")
    return Link(latency_s, _number(document, values["bytes_per_s"], f"{key}.bytes_per_s", is_rate=True))


def _reduce(document: Document, value: Any, key: str) -> AllReduce | None:
    if value is None:
        return None
    values = _mapping(document, value, key, ("num_ranks", "seconds"))
    num_ranks = _whole(document, values["num_ranks"], f"{key}.num_ranks", least=2)
    return AllReduce(num_ranks, _curve(document, values["seconds"], f"{key}.seconds"))


def _curve(document: Document, value: Any, key: str) -> Curve:
    points = _mapping(document, value, key)
    if not points:
        raise document.error(key, "needs at least one measured point")
    found = []
    for x, y in points.items():
        if not x.isdecimal() or not 1 <= int(x) <= _MOST:
            raise document.error(f"{key}.{x}", f"must be a whole number above 0, not {x!r}")
        found.append((int(x), _number(document, y, f"{key}.{x}", is_rate=True)))
    return tuple(sorted(found))


def _mapping(
    document: Document, value: Any, key: str, needed: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise document.error(key, f"must be a mapping of keys to values, not {type(value).__name__}")
    known = needed + optional
    for name in value if known else ():
        if name not in known:
            raise document.error(f"{key}.{name}" if key else name, f"is no key here; known: {', '.join(known)}")
    for name in needed:
        if name not in value:
            raise document.error(key, f"lacks the key {name!r}: `lepton-dist profile` writes files that have all")
    return value


def _list(document: Document, value: Any, key: str, least: int = 1) -> list[Any]:
    if not isinstance(value, list) or len(value) < least:
        raise document.error(key, "must be a list" + (" of at least one entry" if least else ""))
    return value


def _whole(document: Document, value: Any, key: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise document.error(key, f"must be a whole number of at least {least}, not {value!r}")
    return value


def _number(document: Document, value: Any, key: str, *, is_rate: bool = False) -> float:
    """A number of at least 0, and above it for rates. YAML takes 1e9 for text, people do not."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0 <= number < float("inf") or (is_rate and number == 0):
        raise document.error(key, f"must be a number {'above' if is_rate else 'of at least'} 0, not {value!r}")
    return number
