"""A shard is the same whether its matrices are packed row by row as they are read, or read whole and then packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lepton_dist.bench.shapes import shaped_model
from lepton_dist.comm.world import World, run_local
from lepton_dist.errors import CheckpointError
from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.kernels.cpu.panels import panel_kind
from lepton_dist.model.held import HeldParameters
from lepton_dist.parallel.load import load_seat
from lepton_dist.parallel.packing import Packing, packed_matrices
from lepton_dist.plan.document import parse_plan
from lepton_dist.plan.precision import Dtypes
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


def draw(model: Path, plan: str) -> Blueprint:
    parsed = parse_plan(plan)
    return Blueprint.draw(str(model), parsed, parsed.mesh.size if parsed.mesh is not None else len(parsed.ranks))


def load(model: Path, plan: str, weights: str) -> list[HeldParameters]:
    """What each rank of a plan holds."""
    blueprint, dtypes = draw(model, plan), Dtypes(weights, *["bfloat16"] * 3)

    def body(world: World) -> HeldParameters:
        return load_seat(world, blueprint.index, blueprint.table, blueprint.seats, dtypes)

    return run_local(len(blueprint.seats), body)


def bits_of(held: HeldParameters) -> Mapping[str, torch.Tensor]:
    matrices = {name: form.packed for name, form in held.matrices.items() if isinstance(form, PanelWeight)}
    assert len(matrices) == len(held.matrices)
    return {**matrices, **held.tensors}


def assert_same(mine: HeldParameters, expected: HeldParameters) -> None:
    left, right = bits_of(mine), bits_of(expected)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in right)


@needs_panels
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_packed_as_read(plan: str, weights: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if panel_kind("bfloat16", weights) is None:
        pytest.skip("bfloat16 is not held as panels on this machine")
    by_rows = load(model, plan, weights)
    monkeypatch.setattr("lepton_dist.parallel.load.packed_matrices", lambda *arguments: ())
    whole = load(model, plan, weights)
    for mine, expected in zip(by_rows, whole, strict=True):
        assert_same(mine, expected)


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
@pytest.mark.parametrize("of", ["int8", "int4"])
def test_what_was_begun_is_taken_up_if_it_is_what_is_wanted(of: str, model: Path) -> None:
    blueprint, dtypes = draw(model, PLANS["one"]), Dtypes("int8", *["bfloat16"] * 3)
    begun = Packing(packed_matrices(blueprint.index, blueprint.table, blueprint.seats[0], replace(dtypes, weights=of)))
    begun.begin()

    def body(world: World) -> HeldParameters:
        return load_seat(world, blueprint.index, blueprint.table, blueprint.seats, dtypes, begun=begun)

    (held,) = run_local(1, body)
    (expected,) = load(model, PLANS["one"], "int8")
    assert_same(held, expected)
    own = set(map(id, begun.finish(1).values()))
    kept = {id(form._panels) for form in held.matrices.values() if isinstance(form, PanelWeight)}
    assert (kept == own) == (of == "int8")


@needs_panels
def test_a_file_that_ends_early_is_named(model: Path, tmp_path: Path) -> None:
    index = draw(model, PLANS["one"]).index
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((model / file).read_bytes())
    blueprint = draw(tmp_path, PLANS["one"])
    last = max(index.tensors.values(), key=lambda tensor: tensor.offset)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(last.offset + last.num_bytes - 3)  # after its header was read

    def body(world: World) -> None:
        dtypes = Dtypes("int8", *["bfloat16"] * 3)
        load_seat(world, blueprint.index, blueprint.table, blueprint.seats, dtypes)

    with pytest.raises(CheckpointError, match=f"is truncated: '{last.name}' ends 3 bytes early"):
        run_local(1, body)
