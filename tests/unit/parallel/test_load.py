"""Parameters on their way share memory, and none that is kept is written over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lepton_dist.comm.world import World, run_local
from lepton_dist.parallel.load import load_seat
from lepton_dist.plan.plan import Plan
from lepton_dist.runtime.blueprint import Blueprint

EXAMPLE = Path(__file__).parents[3] / "configs" / "examples" / "tiny-stdlib"


@pytest.mark.parametrize("mesh", [{"dp": 1}, {"dp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("every", [0, 1, 2], ids=["keep all", "keep none", "keep every other"])
def test_what_is_kept_stays_as_it_was_read(mesh: dict[str, int], every: int) -> None:
    plan = Plan.from_mesh(**mesh)
    blueprint = Blueprint.draw(str(EXAMPLE), plan, plan.mesh.size if plan.mesh else 1)

    def load(world: World) -> dict[str, torch.Tensor]:
        kept: dict[str, torch.Tensor] = {}

        def take(name: str, tensor: torch.Tensor) -> bool:
            is_kept = tensor.dim() == 1 or every == 0 or (every == 2 and len(kept) % 2 == 0)
            kept[name] = tensor if is_kept else tensor.clone()
            return is_kept

        load_seat(world, blueprint.index, blueprint.table, blueprint.seats, torch.float32, take)
        return kept

    results = run_local(len(blueprint.seats), load)
    stored = load_file(EXAMPLE / "model.safetensors")
    total = 0.0
    for kept in results:
        assert set(kept) == {one.name for one in blueprint.table.of_stage(range(blueprint.config.shape.num_layers))}
        # Each value is on one rank of a stage, but norms are on all.
        total += sum(float(tensor.double().sum()) for tensor in kept.values() if tensor.dim() > 1)
    wanted = sum(float(tensor.double().sum()) for tensor in stored.values() if tensor.dim() > 1)
    replicas = len(blueprint.plan.replicas)
    assert total == pytest.approx(replicas * wanted, rel=1e-9)
    if not mesh.get("tp"):
        down = "layers.1.down.weight"
        for kept in results:
            assert torch.equal(kept[down], stored["model.layers.1.mlp.down_proj.weight"].float())
