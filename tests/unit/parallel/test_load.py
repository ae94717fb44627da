"""A shard is the same whether its matrices are packed row by row as they are read, or read whole and then packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lepton_dist.bench.shapes import shaped_model
from lepton_dist.comm.world import World, run_local
from lepton_dist.errors import CheckpointError
from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.kernels.linear import panel_kind
from lepton_dist.model.held import HeldParameters
from lepton_dist.parallel.load import load_seat
from lepton_dist.plan.document import parse_plan
from lepton_dist.runtime.blueprint import Blueprint

PLANS = {
    "one": "mesh: {tp: 1}",
    "tp": "mesh: {tp: 2}",
    "uneven": "replicas: [{stages: [{ranks: [0, 1, 2], shares: [5, 2, 1]}]}]",  # rows that end within a panel
    "pp": "mesh: {pp: 3}",
    "replicas": "mesh: {dp: 2, tp: 2}",
}
needs_panels = pytest.mark.skipif(native_library() is None, reason="no compiled kernels: not built, or no AVX2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shaped_model("tiny", tmp_path_factory.mktemp("models"))


def load(model: Path, plan: str, weights: str) -> list[HeldParameters]:
    """What each rank of a plan holds."""
    parsed = parse_plan(plan)
    size = parsed.mesh.size if parsed.mesh is not None else len(parsed.ranks)
    blueprint = Blueprint.draw(str(model), parsed, size)

    def body(world: World) -> HeldParameters:
        held = HeldParameters(weights)
        load_seat(world, blueprint.index, blueprint.table, blueprint.seats, torch.bfloat16, held)
        return held

    return run_local(size, body)


def bits_of(held: HeldParameters) -> Mapping[str, torch.Tensor]:
    matrices = {name: form.panels for name, form in held.matrices.items() if isinstance(form, PanelWeight)}
    assert len(matrices) == len(held.matrices)
    return {**matrices, **held.tensors}


@needs_panels
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_packed_as_read(plan: str, weights: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if panel_kind(torch.bfloat16, torch.device("cpu"), weights) is None:
        pytest.skip("bfloat16 is not held as panels on this machine")
    monkeypatch.setattr("lepton_dist.parallel.load._PIECE_BYTES", 20_000)  # several pieces a matrix
    by_rows = [bits_of(held) for held in load(model, plan, weights)]
    monkeypatch.setattr(HeldParameters, "by_rows", lambda *arguments: None)
    whole = [bits_of(held) for held in load(model, plan, weights)]
    for mine, expected in zip(by_rows, whole, strict=True):
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name], expected[name]) for name in expected)


@needs_panels
def test_most_matrices_never_lie_in_memory_as_stored(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    take = HeldParameters.take
    monkeypatch.setattr(
        HeldParameters, "take", lambda held, name, tensor: (taken.append(name), take(held, name, tensor))
    )
    (held,) = load(model, PLANS["one"], "int8")
    assert held.matrices and not set(taken) & set(held.matrices)


@needs_panels
def test_a_file_that_ends_early_is_named(model: Path, tmp_path: Path) -> None:
    index = Blueprint.draw(str(model), parse_plan(PLANS["one"]), 1).index
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((model / file).read_bytes())
    plan = parse_plan(PLANS["one"])
    blueprint = Blueprint.draw(str(tmp_path), plan, 1)
    last = max(index.tensors.values(), key=lambda tensor: tensor.offset)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(last.offset + last.num_bytes - 3)  # after its header was read

    def body(world: World) -> None:
        load_seat(world, blueprint.index, blueprint.table, blueprint.seats, torch.bfloat16, HeldParameters("int8"))

    with pytest.raises(CheckpointError, match=f"is truncated: '{last.name}' ends 3 bytes early"):
        run_local(1, body)
