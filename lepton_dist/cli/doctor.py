"""`lepton-dist doctor`: look at the machines, the links, and if named a model, a plan and a place for the output."""

from __future__ import annotations

import argparse

from lepton_dist.cli.imports import lasting_imports
from lepton_dist.values import FLOATS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--model", metavar="DIR", help="check this checkpoint too: complete, and seen by every node")
    parser.add_argument("--plan", metavar="FILE", help="check that this sharding plan fits the ranks and their memory")
    parser.add_argument("--dtype", choices=FLOATS, help="as for generate, for the memory")
    parser.add_argument("--output", metavar="DIR", help="check that results can be written and locked here")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object with all facts")


def run_command(options: argparse.Namespace) -> int:
    """Print the checks; 0 when none failed (warnings allowed), 2 when one did."""
    with lasting_imports():
        from lepton_dist.bench.doctor import DoctorConfig, diagnose
        from lepton_dist.runtime.run import run
    config = DoctorConfig(**vars(options))
    return run(lambda controller, interrupts: diagnose(controller, config))
