"""`lepton-dist inspect`: what each rank would hold, without starting MPI."""

from __future__ import annotations

import argparse

from lepton_dist.cli.imports import lasting_imports
from lepton_dist.errors import ConfigError, UsageError
from lepton_dist.plan.document import plan_to_yaml
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.values import FLOATS, MOST_RANKS, checked_whole


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--model", metavar="DIR", required=True, help="a Hugging Face checkpoint directory")
    parser.add_argument("--plan", metavar="FILE", help="a sharding plan (YAML)")
    parser.add_argument("--ranks", type=int, metavar="N", help="size of the job; default: what the plan needs, or 1")
    parser.add_argument("--dtype", choices=FLOATS, help="over the plan's precision")
    parser.add_argument("--link", metavar="US,MBIT", help="price the traffic on a link of this latency and rate")
    parser.add_argument(
        "--ranks-per-node", type=int, default=1, metavar="N", help="for --link: ranks that share one (1)"
    )


def run_command(options: argparse.Namespace) -> int:
    """Print the table; returns 0.

    Raises:
        UsageError: the model or the plan is wrong.
    """
    try:
        for name, value in (("--ranks", options.ranks), ("--ranks-per-node", options.ranks_per_node)):
            if value is not None:
                checked_whole(name, value, 1, MOST_RANKS)
    except ValueError as error:
        raise UsageError(str(error)) from None
    with lasting_imports():
        from lepton_dist.bench.inspect import seat_table, world_size_of
        from lepton_dist.bench.links import LinkReport, NetworkLink
        from lepton_dist.runtime.blueprint import Blueprint
        from lepton_dist.runtime.opening import load_plan_document
    link = NetworkLink.parse(options.link) if options.link else None
    plan, document = load_plan_document(options.plan)
    plan = plan or Plan()
    ranks = options.ranks or world_size_of(plan)
    plan = plan.laid_out([0] * ranks)
    try:
        blueprint = Blueprint.draw(options.model, plan, ranks)
    except ConfigError as error:
        raise (document.located(error) if document else error) from None
    dtypes = decide_dtypes(plan.precision, options.dtype, blueprint.config.dtype)
    shape = blueprint.config.shape
    print(
        f"{options.model}: {blueprint.config.family}, {shape.num_layers} layers, {shape.num_heads} heads, "
        f"{shape.num_kv_heads} KV heads, vocabulary {shape.vocab}, context {blueprint.context_tokens}; "
        f"weights {dtypes.weights}, KV cache {dtypes.kv_cache}"
    )
    print(seat_table(blueprint, dtypes))
    if link is not None:
        print("", *LinkReport(blueprint, dtypes, link, options.ranks_per_node).lines(), sep="\n")
    print("\nthe plan in full:\n" + plan_to_yaml(blueprint.plan), end="")
    return 0
