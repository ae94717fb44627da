"""`lepton-dist profile`: measure the ranks of this job and their links into a cluster file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lepton_dist.bench.profile import summary
from lepton_dist.coordinator.cluster_document import write_cluster
from lepton_dist.runtime.compute import KINDS
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.profiling import make_cluster
from lepton_dist.runtime.run import run
from lepton_dist.storage.outputs import check_writable


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--name", metavar="NAME", required=True, help="what to call this cluster")
    parser.add_argument("--output", metavar="FILE", help="where to write (configs/clusters/NAME.yaml)")


def run_command(options: argparse.Namespace) -> int:
    """Measure and write; returns 0.

    Raises:
        OutputError: the file cannot be written.
    """
    output = Path(options.output or Path("configs", "clusters", f"{options.name}.yaml"))
    return run(lambda controller, interrupts: _profile(controller, options.name, output))


def _profile(controller: Controller, name: str, output: Path) -> int:
    start_s = time.perf_counter()
    check_writable(output)
    facts = controller.examine(kinds=KINDS)
    world = controller.world
    cluster = make_cluster(name, world.hosts, world.nodes, facts)
    write_cluster(cluster, output)
    print(summary(cluster, cluster.slow_hosts()))
    print(f"{world.size} rank(s) measured in {time.perf_counter() - start_s:.1f} s: {output}")
    sys.stdout.flush()
    return 0
