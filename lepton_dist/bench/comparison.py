"""`bench`: the cases under each setting in turn, and the settings side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lepton_dist.bench.limits import limits_table, measure_limits
from lepton_dist.bench.measure import Figure, Measurement
from lepton_dist.bench.peer import PeerOrder, measure_peer, missing_peer
from lepton_dist.bench.plot import write_plot
from lepton_dist.bench.settings import parse_setting
from lepton_dist.bench.shapes import shaped_model
from lepton_dist.bench.workload import DECODES
from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.plan.plan import Plan
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.opening import ModelRequest, load_plan_document
from lepton_dist.storage.outputs import write_output
from lepton_dist.telemetry.voice import notice


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. `model` None is one of `shape`, kept in `folder`; `json` and `plot` are files to write."""

    model: str | None
    shape: str
    folder: str
    plan: str | None
    compare: str
    cases: Sequence[str]
    repeats: int
    output_tokens: int
    threads: int
    peer: str | None
    json: str | None
    plot: str | None


def run_bench(controller: Controller, options: BenchOptions) -> int:
    """Measure and print a table; returns 0.

    Raises:
        OutputError: a file could not be written.
        UsageError: a setting, the plan or the model is wrong.
    """
    plan, _ = load_plan_document(options.plan)
    settings = [parse_setting(name, controller.world.size) for name in options.compare.split(",")]
    model = options.model or str(shaped_model(options.shape, Path(options.folder)))
    given = (plan or Plan()).laid_out(controller.world.nodes)
    plans = {setting.name: setting.over(given) for setting in settings}  # all are right before one is measured
    cluster = measure_limits(controller, options.threads)
    _show(limits_table(cluster))
    table: dict[str, list[Figure]] = {}
    for name, chosen in plans.items():
        table[name] = _measure(controller, options, chosen, model, cluster)
        _show(_figures_table(name, table[name]))
    if options.peer:
        for name, figures in _measure_peer(controller, options, options.peer, model).items():
            table[name] = figures
            _show(_figures_table(name, figures))
    if len(table) > 1:
        _show(_comparison(table))
    if options.json:
        write_output(options.json, _json(model, table))
    if options.plot:
        write_plot(Path(options.plot), Path(model).name, table)
    return 0


def _measure(
    controller: Controller,
    options: BenchOptions,
    plan: Plan,
    model: str,
    cluster: Cluster,
) -> list[Figure]:
    request = ModelRequest(model, plan, threads=options.threads)
    measurement = Measurement(controller, request, plan, options.output_tokens)
    figures = [measurement.load]
    figures += [measurement.case(case, options.repeats, cluster) for case in options.cases]
    measurement.close()
    return figures


def _measure_peer(controller: Controller, options: BenchOptions, peer: str, model: str) -> dict[str, list[Figure]]:
    """The peer on this host, after our last setting and with the threads of all its ranks here."""
    if reason := missing_peer(peer):
        notice(reason)
        return {}
    world = controller.world
    here = [ready for ready in controller.ready.values() if ready.num_blocks and world.nodes[ready.rank] == 0]
    known = [case for case in options.cases if case == "prefill" or case == "offline" or case in DECODES]
    threads = sum(ready.threads for ready in here)
    order = PeerOrder(model, known, options.repeats, options.output_tokens, threads)
    return {f"{peer}, {threads} thread(s)": measure_peer(order, controller.advance)}


def _show(text: str) -> None:
    """At once: what is measured stands there, whatever ends the job."""
    print(text)
    sys.stdout.flush()


def _figures_table(name: str, figures: list[Figure]) -> str:
    lines = [f"{name}\n  {'case':12}{'median':>10}{'lowest':>10}{'highest':>10}  unit      peak MiB  of the limit"]
    for figure in figures:
        share = "" if figure.share is None else f"{figure.share:.2f} of {figure.limit:.1f}"
        values = f"{figure.value:10.1f}{figure.lowest:10.1f}{figure.highest:10.1f}"
        if figure.is_beyond_limit:
            # It was measured in a quieter moment than the limit, or what is read fits the caches.
            values, share = f"{'beyond its limit':>30}", f"over {figure.limit:.1f}"
        peak = "" if figure.peak_bytes is None else f"{figure.peak_bytes / 2**20:.0f}"
        lines.append(f"  {figure.case:12}{values}  {figure.unit:8}  {peak:>8}  {share}")
    return "\n".join(lines)


def _comparison(table: dict[str, list[Figure]]) -> str:
    """Every setting's medians, and in brackets how many times those of the first."""
    first = {figure.case: figure.value for figure in next(iter(table.values()))}
    width = max(map(len, table)) + 2
    lines = ["medians (times the first)", f"  {'':{width}}" + "".join(f"{case:>18}" for case in first)]
    for name, figures in table.items():
        found = {
            figure.case: "beyond its limit"
            if figure.is_beyond_limit
            else f"{figure.value:.1f} ({figure.value / first[figure.case]:.2f})"
            for figure in figures
        }
        lines.append(f"  {name:{width}}" + "".join(f"{found.get(case, ''):>18}" for case in first))
    return "\n".join(lines)


def _json(model: str, table: dict[str, list[Figure]]) -> str:
    data: dict[str, Any] = {"model": model, "torch": str(torch.__version__)}
    data["settings"] = {name: [figure.as_json() for figure in figures] for name, figures in table.items()}
    return json.dumps(data, indent=1) + "\n"
