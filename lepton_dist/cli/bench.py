"""`lepton-dist bench`: measure a model, or a shape of one, under one setting or several."""

from __future__ import annotations

import argparse

from lepton_dist.bench.shapes import SHAPES
from lepton_dist.bench.workload import CASES, MORE_CASES, PEERS
from lepton_dist.cli.imports import lasting_imports
from lepton_dist.errors import UsageError
from lepton_dist.storage.outputs import check_writable, refuse_overwriting
from lepton_dist.values import checked_threads, checked_whole

_MOST = 1_000_000


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
    try:
        checked_whole("--repeats", options.repeats, 1, _MOST)
        checked_whole("--output-tokens", options.output_tokens, 1, _MOST)
        checked_threads(options.threads)
    except ValueError as error:
        raise UsageError(str(error)) from None
    refuse_overwriting(
        {"--json": options.json, "--plot": options.plot}, {"--model": options.model, "--plan": options.plan}
    )
    with lasting_imports():
        from lepton_dist.bench.comparison import BenchOptions, run_bench
        from lepton_dist.bench.plot import check_plotting
        from lepton_dist.runtime.run import run
    if options.plot:
        check_plotting()
    for path in (options.json, options.plot):
        if path:
            check_writable(path)
    return run(lambda controller, interrupts: run_bench(controller, BenchOptions(**{**vars(options), "cases": cases})))
