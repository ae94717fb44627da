"""`lepton-dist bench`: measure a model, or a shape of one, under one setting or several."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lepton_dist.bench.limits import limits_table, measure_limits
from lepton_dist.bench.measure import CASES, DECODES, MORE_CASES, Figure, Measurement
from lepton_dist.bench.peer import PEERS, PeerOrder, measure_peer, missing_peer
from lepton_dist.bench.plot import check_plotting, write_plot
from lepton_dist.bench.settings import parse_setting
from lepton_dist.bench.shapes import SHAPES, shaped_model
from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.errors import UsageError
from lepton_dist.plan.plan import Plan
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.opening import ModelRequest, load_plan_document, notice
from lepton_dist.runtime.run import run
from lepton_dist.storage.outputs import check_writable, write_output


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--model", metavar="DIR", help="a checkpoint; by default one of --shape is made")
    parser.add_argument("--shape", choices=SHAPES, default="160m", help="a Llama shape with random weights (160m)")
    parser.add_argument("--folder", metavar="DIR", default=".", help="where models of a shape are made and kept (.)")
    parser.add_argument("--plan", metavar="FILE", help="the plan of the setting `plan`")
    parser.add_argument("--compare", metavar="A,B", default="plan", help="settings: plain,tp2,pp2+fp32,int8")
    parser.add_argument("--cases", metavar="A,B", default=",".join(CASES), help=f"these, or {', '.join(MORE_CASES)}")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each case (3)")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N", help="decoded tokens of a request (32)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads a rank")
    parser.add_argument("--peer", choices=PEERS, help="measure it in the same run, with as many threads")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--plot", metavar="FILE", help="and a picture of them, as PNG (needs matplotlib)")


def run_command(options: argparse.Namespace) -> int:
    """Measure and print a table; returns the exit code.

    Raises:
        OutputError: a file could not be written.
        UsageError: an option is wrong.
    """
    cases = options.cases.split(",")
    for case in cases:
        if case not in (*CASES, *MORE_CASES):
            raise UsageError(f"--cases: {case!r} is unknown; known: {', '.join((*CASES, *MORE_CASES))}")
    if options.repeats < 1 or options.output_tokens < 1:
        raise UsageError("--repeats and --output-tokens must be at least 1")
    if options.plot:
        check_plotting()
    for path in (options.json, options.plot):
        if path:
            check_writable(path)
    return run(lambda controller, interrupts: _bench(controller, options, cases))


def _bench(controller: Controller, options: argparse.Namespace, cases: list[str]) -> int:
    plan, _ = load_plan_document(options.plan)
    settings = [parse_setting(name, controller.world.size) for name in options.compare.split(",")]
    model = options.model or str(shaped_model(options.shape, Path(options.folder)))
    given = plan or Plan.default(controller.world.nodes)
    plans = {setting.name: setting.over(given) for setting in settings}  # all are right before one is measured
    cluster = measure_limits(controller, options.threads)
    _show(limits_table(cluster))
    table: dict[str, list[Figure]] = {}
    for name, chosen in plans.items():
        table[name] = _measure(controller, options, cases, chosen, model, cluster)
        _show(_figures_table(name, table[name]))
    if options.peer:
        for name, figures in _measure_peer(controller, options, cases, model).items():
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
    options: argparse.Namespace,
    cases: list[str],
    plan: Plan,
    model: str,
    cluster: Cluster,
) -> list[Figure]:
    request = ModelRequest(model, plan, threads=options.threads)
    measurement = Measurement(controller, request, plan, options.output_tokens)
    figures = [measurement.load]
    figures += [measurement.case(case, options.repeats, cluster) for case in cases]
    measurement.close()
    return figures


def _measure_peer(
    controller: Controller, options: argparse.Namespace, cases: list[str], model: str
) -> dict[str, list[Figure]]:
    """The peer on this host, after our last setting and with the threads of all its ranks here."""
    if reason := missing_peer(options.peer):
        notice(reason)
        return {}
    world = controller.world
    here = [ready for ready in controller.ready.values() if ready.num_blocks and world.nodes[ready.rank] == 0]
    known = [case for case in cases if case == "prefill" or case == "offline" or case in DECODES]
    threads = sum(ready.threads for ready in here)
    order = PeerOrder(model, known, options.repeats, options.output_tokens, threads)
    return {f"{options.peer}, {threads} thread(s)": measure_peer(order, controller.advance)}


def _show(text: str) -> None:
    """At once: what is measured stands there, whatever ends the job."""
    print(text)
    sys.stdout.flush()


def _figures_table(name: str, figures: list[Figure]) -> str:
    lines = [f"{name}\n  {'case':12}{'median':>10}{'lowest':>10}{'highest':>10}  unit      peak MiB  of the limit"]
    for figure in figures:
        share = "" if figure.share is None else f"{figure.share:.2f} of {figure.limit:.1f}"
        values = f"{figure.value:10.1f}{figure.lowest:10.1f}{figure.highest:10.1f}"
        peak = "" if figure.peak_bytes is None else f"{figure.peak_bytes / 2**20:.0f}"
        lines.append(f"  {figure.case:12}{values}  {figure.unit:8}  {peak:>8}  {share}")
    return "\n".join(lines)


def _comparison(table: dict[str, list[Figure]]) -> str:
    """Every setting's medians, and in brackets how many times those of the first."""
    first = {figure.case: figure.value for figure in next(iter(table.values()))}
    width = max(map(len, table)) + 2
    lines = ["medians (times the first)", f"  {'':{width}}" + "".join(f"{case:>18}" for case in first)]
    for name, figures in table.items():
        found = {figure.case: f"{figure.value:.1f} ({figure.value / first[figure.case]:.2f})" for figure in figures}
        lines.append(f"  {name:{width}}" + "".join(f"{found.get(case, ''):>18}" for case in first))
    return "\n".join(lines)


def _json(model: str, table: dict[str, list[Figure]]) -> str:
    data: dict[str, Any] = {"model": model, "torch": str(torch.__version__)}
    data["settings"] = {name: [figure.as_json() for figure in figures] for name, figures in table.items()}
    return json.dumps(data, indent=1) + "\n"
