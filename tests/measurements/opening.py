"""What opening a session costs every rank of a large job, beyond loading: ``python -m tests.measurements.opening``.

1,024 ranks, 80 layers of a Llama: reading the plan, finding every seat, and asking how many KV blocks fit each rank.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from lepton_dist.bench.shapes import LlamaShape, shape_config
from lepton_dist.model.parameters import ParameterTable
from lepton_dist.model.registry import read_model
from lepton_dist.parallel.checkpoint import Checkpoint
from lepton_dist.plan.document import parse_plan, plan_to_yaml
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import Dtypes
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.fitting import Fitting
from lepton_dist.storage.index import CheckpointIndex

SHAPE = LlamaShape(8192, 80, 64, 8, 128, 28672, 128256)
DTYPES = Dtypes(*["bfloat16"] * 4)


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape_config(SHAPE)), encoding="utf-8")
        config, family = read_model(folder)
    for dp, pp, tp in ((128, 1, 8), (32, 4, 8)):
        world = dp * pp * tp
        text = plan_to_yaml(Plan.from_mesh(dp=dp, pp=pp, tp=tp).resolve(config.shape, world))
        start = time.thread_time()
        plan = parse_plan(text)
        parsed_s = time.thread_time() - start
        table = ParameterTable(config, family, "model.")
        checkpoint = Checkpoint(config, CheckpointIndex(Path(), {}), table, "", {}, {})
        blueprint = Blueprint(checkpoint, plan.resolve(config.shape, world))
        seated = blueprint.seats
        seats_s = time.thread_time() - start - parsed_s
        fitting = Fitting(blueprint, DTYPES)
        blocks = {rank: fitting.blocks(seat, 1 << 40, "host") for rank, seat in sorted(seated.items())}
        whole_s = time.thread_time() - start
        assert len(blocks) == world
        print(
            f"opening {world} ranks (dp {dp}, pp {pp}, tp {tp}), 80 layers: {whole_s:.2f} s "
            f"(plan {parsed_s:.2f}, seats {seats_s:.2f}, fitting {whole_s - parsed_s - seats_s:.2f})"
        )


if __name__ == "__main__":
    main()
