"""How much memory is touched ahead: about what the rank will hold, and none where nobody can tell yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_dist.bench.shapes import shaped_model
from lepton_dist.comm.launcher import Launcher
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.parallel.requirements import weight_bytes
from lepton_dist.plan.document import parse_plan
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime import head_start
from lepton_dist.runtime.blueprint import Blueprint

pytestmark = pytest.mark.skipif(native_library() is None, reason="no compiled kernels: not built, or no AVX2")


class Begun:
    """Stands for the reserve: keeps what it was told to touch."""

    num_bytes = 0

    def begin(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes


def touched(
    model: Path,
    plan: Path | None,
    monkeypatch: pytest.MonkeyPatch,
    size: int = 1,
    rank: int = 0,
    dtype: str | None = None,
) -> int:
    begun = Begun()
    monkeypatch.setattr(head_start, "reserve", lambda: begun)
    monkeypatch.setattr(head_start, "read_launcher", lambda: Launcher("mpich", rank, size))
    head_start.touch_ahead(str(model), None if plan is None else str(plan), dtype)
    return begun.num_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shaped_model("160m", tmp_path_factory.mktemp("models"))  # embedding and head are small beside the layers


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", "int4-128"])
@pytest.mark.parametrize(
    ("plan", "size"), [("mesh: {tp: 1}", 1), ("mesh: {tp: 2}", 2), ("mesh: {pp: 2}", 2), ("mesh: {dp: 2, tp: 2}", 4)]
)
def test_about_what_a_rank_holds(
    plan: str, size: int, weights: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(f"{plan}\nprecision: {{weights: {weights}}}\n", encoding="utf-8")
    parsed = parse_plan(file.read_text(encoding="utf-8"))
    blueprint = Blueprint.draw(str(model), parsed, size)
    dtypes = decide_dtypes(parsed.precision, None, "bfloat16")
    for rank, seat in blueprint.seats.items():
        held = weight_bytes(blueprint.table, seat, dtypes)
        # The embedding is not rounded and the head not to 4 bits: a third of this model's weights.
        assert 0.5 * held < touched(model, file, monkeypatch, size, rank) < 1.05 * held


def test_without_a_plan_all_ranks_share_one_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blueprint = Blueprint.draw(str(model), Plan.default([0, 0, 1]), 3)
    held = sum(weight_bytes(blueprint.table, seat, decide_dtypes(blueprint.plan.precision, None, "bfloat16"))
               for seat in blueprint.seats.values())  # fmt: skip
    assert touched(model, None, monkeypatch, 3) == pytest.approx(held / 3, rel=0.01)


@pytest.mark.parametrize(
    ("plan", "dtype"),
    [
        ("mesh: auto\ncluster: here.yaml", None),
        ("mesh: {tp: 1}\ndevice: cuda", None),
        ("replicas: [{stages: [{ranks: [0], device: auto}]}]", None),
        ("replicas: [{stages: [{ranks: [1]}]}]", None),  # this rank is left out
        ("mesh: {tp: 1}", "float32"),
        ("mesh: {tp: 1}", "float16"),
        ("mesh: {tp: one}", None),
        ("mesh: [", None),
        (None, "int9"),
    ],
)
def test_nothing_where_nobody_can_tell(
    plan: str | None, dtype: str | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.yaml"
    if plan is not None:
        file.write_text(plan, encoding="utf-8")
    assert touched(model, file if plan is not None else None, monkeypatch, dtype=dtype) == 0
    assert touched(tmp_path / "nowhere", None, monkeypatch) == 0
    assert touched(tmp_path, None, monkeypatch) == 0  # a directory, and no model
    assert touched(model, tmp_path / "absent.yaml", monkeypatch) == 0


def test_never_most_of_the_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start, "available_bytes", lambda ranks: 100 << 20)
    assert touched(model, None, monkeypatch) == 50 << 20
