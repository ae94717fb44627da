"""`lepton-dist profile`: measure the ranks of this job and their links into a cluster file."""

from __future__ import annotations

import argparse
from pathlib import Path

from lepton_dist.cli.imports import lasting_imports


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--name", metavar="NAME", required=True, help="what to call this cluster")
    parser.add_argument("--output", metavar="FILE", help="where to write (configs/clusters/NAME.yaml)")


def run_command(options: argparse.Namespace) -> int:
    """Measure and write; returns 0.

    Raises:
        OutputError: the file cannot be written.
    """
    with lasting_imports():
        from lepton_dist.bench.profile import profile_job
        from lepton_dist.runtime.run import run
    output = Path(options.output or Path("configs", "clusters", f"{options.name}.yaml"))
    return run(lambda controller, interrupts: profile_job(controller, options.name, output))
