"""Planning clusters of four kinds of ranks: ``python -m tests.measurements.planning [--plans FILE]``.

`--plans` writes the plans of several clusters as text, to compare one version of the planner with another.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from lepton_dist.coordinator.cluster import Cluster, Link
from lepton_dist.coordinator.planner import DoesNotFitError, Objective, rank_plans
from lepton_dist.coordinator.workload import RequestLengths, Workload
from tests.unit.coordinator.test_oracles import machines
from tests.unit.coordinator.test_planner import LARGE, SHAPE, STREAM, target

BATCH = Workload.of([RequestLengths(100, 100, 100)] * 400)


def four_kinds(num_nodes: int, per_node: int) -> Cluster:
    """Nodes of speeds 1, 2, 5 and 9, as many of each."""
    speeds = [(1.0, 2.0, 5.0, 9.0)[node * 4 // num_nodes] for node in range(num_nodes) for _ in range(per_node)]
    return machines(speeds, [node for node in range(num_nodes) for _ in range(per_node)])


def seconds(cluster: Cluster) -> float:
    """Processor seconds of planning a short batch of Llama-3-8B's shape."""
    start = time.thread_time()
    rank_plans(target(cluster, LARGE, BATCH))
    return time.thread_time() - start


def texts() -> str:
    """The plans of small and middling clusters, with their prices."""
    clusters = {
        "one": machines([1.0], [0]),
        "unlike": machines([1.0, 3.0, 2.0, 2.0], [0, 0, 1, 1]),
        "nodes": replace(machines([1.0] * 8, [0, 0, 1, 1, 2, 2, 3, 3]), between_nodes=Link(1e-4, 1e9)),
        "pairs": replace(machines([1.0] * 6, [0, 0, 1, 1, 2, 2]), pairs={(0, 1): Link(1e-5, 5e9)}),
        "kinds": four_kinds(8, 2),
        "64": four_kinds(16, 4),
    }
    mixed = Workload.of([RequestLengths(20 + 37 * i % 400, 10 + 23 * i % 90, 128) for i in range(200)])
    objectives: tuple[Objective, ...] = ("throughput", "latency")
    lines = []
    for name, cluster in clusters.items():
        for shape in (SHAPE, LARGE):
            for kind, workload in (("stream", STREAM), ("batch", BATCH), ("mixed", mixed)):
                for objective in objectives if name != "64" or kind == "batch" else ():
                    lines.append(f"--- {name} {shape.hidden} {kind} {objective}")
                    try:
                        lines += map(str, rank_plans(target(cluster, shape, workload), objective))
                    except DoesNotFitError as error:
                        lines.append(str(error))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 1024])
    arguments = parser.parse_args()
    if arguments.plans is not None:
        arguments.plans.write_text(texts())
    for ranks in arguments.ranks:
        nodes = 16 if ranks <= 64 else 64
        print(f"planning {ranks} ranks of four kinds: {seconds(four_kinds(nodes, ranks // nodes)):.2f} s")


if __name__ == "__main__":
    main()
