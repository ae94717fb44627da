"""`lepton-dist plan`: the best sharding plan for a model, a cluster and a workload, without starting MPI."""

from __future__ import annotations

import argparse
from pathlib import Path

from lepton_dist.cli.imports import lasting_imports
from lepton_dist.coordinator.estimate import estimated
from lepton_dist.coordinator.plan_text import described
from lepton_dist.coordinator.planner import OBJECTIVES, rank_plans
from lepton_dist.errors import UsageError
from lepton_dist.plan.document import DTYPES, WIRES, plan_to_yaml
from lepton_dist.plan.plan import EngineLimits, Precision
from lepton_dist.plan.precision import QUANTIZED
from lepton_dist.storage.outputs import check_writable, refuse_overwriting
from lepton_dist.values import checked_whole

_MOST = 2**31 - 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--model", metavar="DIR", required=True, help="a Hugging Face checkpoint directory")
    parser.add_argument("--cluster", metavar="FILE", required=True, help="a cluster file of `lepton-dist profile`")
    parser.add_argument(
        "--workload",
        metavar="FILE|PROMPT,OUTPUT",
        required=True,
        help="the input of `generate`, lengths as for `simulate`, or two numbers of tokens for an endless stream",
    )
    parser.add_argument("--objective", choices=OBJECTIVES, default="throughput", help="(throughput)")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write the plan; default: print it")
    parser.add_argument("--weights", choices=(*DTYPES, *QUANTIZED), help="default: the checkpoint's")
    parser.add_argument("--kv-cache", choices=DTYPES, help="default: that of the activations")
    parser.add_argument("--wire", choices=WIRES, help="default: that of the activations")
    parser.add_argument("--max-sequences", type=int, metavar="N", help="sequences that a replica steps together (64)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of rows that do not say, as for `generate`")
    parser.add_argument("--output-tokens", type=int, metavar="N", help="expect outputs this long, not max_tokens")


def run_command(options: argparse.Namespace) -> int:
    """Plan, print and write; returns 0.

    Raises:
        UsageError: an input is wrong, or the model fits on no plan.
    """
    try:
        for name in ("max_sequences", "max_tokens", "output_tokens"):
            if getattr(options, name) is not None:
                checked_whole(f"--{name.replace('_', '-')}", getattr(options, name), 1, _MOST)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if options.output:
        refuse_overwriting(
            {"--output": options.output},
            {"--model": options.model, "--cluster": options.cluster, "--workload": _file(options.workload)},
        )
        check_writable(options.output)
    with lasting_imports():
        from lepton_dist.bench.planning import load_target, write_plan
    precision = Precision(options.weights, options.kv_cache, options.wire)
    limits = EngineLimits(max_sequences=options.max_sequences or EngineLimits().max_sequences)
    lengths = {"max_tokens": options.max_tokens, "output_tokens": options.output_tokens}
    target, notes = load_target(options.model, options.cluster, options.workload, precision, limits, lengths)
    plans = rank_plans(target, options.objective)
    print(described(target, plans, notes))
    plan = estimated(target, plans[0], options.objective, precision, options.cluster)
    if options.output:
        write_plan(options.output, plan)
        print(f"\nplan 1 is written: {options.output}")
    else:
        print("\nplan 1 in full:\n" + plan_to_yaml(plan), end="")
    return 0


def _file(workload: str) -> str | None:
    """The file of a workload that is not two numbers."""
    return workload if Path(workload).exists() else None
