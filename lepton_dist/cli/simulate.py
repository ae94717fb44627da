"""`lepton-dist simulate`: what a workload would take under a plan on a cluster, without the cluster and without MPI."""

from __future__ import annotations

import argparse

from lepton_dist.cli.imports import lasting_imports
from lepton_dist.storage.outputs import check_writable, refuse_overwriting
from lepton_dist.values import FLOATS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--model", metavar="DIR", required=True, help="a Hugging Face checkpoint directory")
    parser.add_argument("--cluster", metavar="FILE", required=True, help="a cluster file of `lepton-dist profile`")
    parser.add_argument("--plan", metavar="FILE", required=True, help="a sharding plan (YAML)")
    parser.add_argument(
        "--workload",
        metavar="FILE",
        required=True,
        help='JSON lines: {"prompt_tokens": N, "output_tokens": N} with max_tokens, arrival_s, count if wanted; '
        "or the input of `generate`",
    )
    parser.add_argument("--dtype", choices=FLOATS, help="over the plan's precision")
    parser.add_argument("--trace", metavar="FILE", help="write a timeline for https://ui.perfetto.dev")
    parser.add_argument("--plot", metavar="FILE", help="write a picture (PNG) of who is busy when")
    parser.add_argument("--decisions", metavar="FILE", help="write the balancer's log, from which it can be replayed")


def run_command(options: argparse.Namespace) -> int:
    """Simulate and print a summary; returns 0.

    Raises:
        UsageError: an input is wrong, or an output cannot be written.
    """
    with lasting_imports():
        from lepton_dist.bench.plot import check_plotting
        from lepton_dist.bench.simulate import load_simulation, summary, write_picture, write_trace
    outputs = {"--trace": options.trace, "--plot": options.plot, "--decisions": options.decisions}
    inputs = {"--model": options.model, "--cluster": options.cluster, "--plan": options.plan}
    refuse_overwriting(outputs, {**inputs, "--workload": options.workload})
    for path in outputs.values():
        if path:
            check_writable(path)
    if options.plot:
        check_plotting()
    simulation = load_simulation(options.model, options.cluster, options.plan, options.workload, options.dtype)
    result = simulation.run(options.decisions)
    print(summary(simulation.plan, result))
    if options.trace:
        write_trace(options.trace, simulation.plan, result)
    if options.plot:
        write_picture(options.plot, simulation.plan, result)
    return 0
