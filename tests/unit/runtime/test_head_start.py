"""What is begun before torch is there: what this rank will hold, and nothing where that cannot be told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lepton_dist.bench.shapes import shaped_model
from lepton_dist.comm.launcher import Launcher
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.parallel.packing import packed_matrices
from lepton_dist.plan.document import parse_plan
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime import head_start
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.head_start import HeadStart

pytestmark = pytest.mark.skipif(native_library() is None, reason="no compiled kernels: not built, or no AVX2")


@pytest.fixture
def start() -> Iterator[HeadStart]:
    mine = HeadStart()
    yield mine
    mine.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shaped_model("tiny", tmp_path_factory.mktemp("models"))


def launched(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, local_size: int | None = None) -> None:
    launcher = Launcher("mpich", rank, size, rank, size if local_size is None else local_size)
    monkeypatch.setattr(head_start, "read_launcher", lambda: launcher)


@pytest.mark.parametrize("weights", ["int8", "int4", "int4-128"])
@pytest.mark.parametrize(("plan", "size"), [("mesh: {tp: 1}", 1), ("mesh: {tp: 2}", 2), ("mesh: {pp: 2}", 2)])
def test_what_a_rank_will_hold(
    plan: str, size: int, weights: str, model: Path, tmp_path: Path, start: HeadStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(f"{plan}\nprecision: {{weights: {weights}}}\n", encoding="utf-8")
    parsed = parse_plan(file.read_text(encoding="utf-8"))
    blueprint = Blueprint.draw(str(model), parsed, size)
    dtypes = decide_dtypes(parsed.precision, None, blueprint.config.dtype)
    for rank, seat in blueprint.seats.items():
        launched(monkeypatch, rank, size)
        start.begin(str(model), str(file), None)
        begun = start.take()
        assert begun is not None and start.take() is None
        assert begun.matrices == packed_matrices(blueprint.index, blueprint.table, seat, dtypes) != ()
        begun.finish(1)
        assert begun.held_bytes == sum(one.num_bytes for one in begun.matrices)
        begun.close()


def test_without_a_plan_the_ranks_of_one_node_share_the_model(
    model: Path, tmp_path: Path, start: HeadStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint = Blueprint.draw(str(model), Plan.default([0, 0]), 2)
    dtypes = decide_dtypes(blueprint.plan.precision, None, blueprint.config.dtype)
    expected = packed_matrices(blueprint.index, blueprint.table, blueprint.seats[1], dtypes)
    launched(monkeypatch, 1, 2)
    start.begin(str(model), None, None)
    begun = start.take()
    assert (() if begun is None else begun.matrices) == expected
    if begun is not None:
        begun.close()
    launched(monkeypatch, 1, 2, local_size=1)  # which ranks share a node is known when they meet
    start.begin(str(model), None, None)
    assert start.take() is None


@pytest.mark.parametrize(
    ("plan", "size"),
    [
        ("mesh: auto\ncluster: here.yaml", 1),
        ("mesh: {tp: 1}\ndevice: cuda", 1),
        ("replicas: [{stages: [{ranks: [0], device: auto}]}]", 1),
        ("replicas: [{stages: [{ranks: [1]}]}]", 2),  # this rank is left out
        ("mesh: {dp: 2}", 2),  # what replicas hold is read once for all
        ("mesh: {tp: 1}\nprecision: {weights: float32}", 1),
        ("mesh: {tp: 1}\nprecision: {weights: float16}", 1),
        ("mesh: {tp: 2}", 1),
        ("mesh: {tp: 1}", 0),  # the launcher does not tell
        ("mesh: {tp: one}", 1),
        ("mesh: [", 1),
    ],
)
def test_nothing_where_it_cannot_be_told(
    plan: str, size: int, model: Path, tmp_path: Path, start: HeadStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(plan, encoding="utf-8")
    launched(monkeypatch, 0, size)
    start.begin(str(model), str(file), None)
    assert start.take() is None and start.held_bytes == 0


def test_nothing_of_what_is_not_there(
    model: Path, tmp_path: Path, start: HeadStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, 0, 1)
    for directory, plan, dtype in (
        (tmp_path / "nowhere", None, None),
        (tmp_path, None, None),  # a directory, and no model
        (model, tmp_path / "absent.yaml", None),
        (model, None, "int9"),
    ):
        start.begin(str(directory), None if plan is None else str(plan), dtype)
        assert start.take() is None


def test_never_most_of_the_memory(
    model: Path, tmp_path: Path, start: HeadStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, 0, 1)
    plan = tmp_path / "plan.yaml"
    plan.write_text("mesh: {tp: 1}\nprecision: {weights: int8}\n", encoding="utf-8")
    start.begin(str(model), str(plan), None)
    begun = start.take()
    assert begun is not None
    begun.close()
    needed = sum(one.num_bytes for one in begun.matrices)
    for available, is_begun in ((2 * needed + 2, True), (2 * needed - 2, False)):
        monkeypatch.setattr(head_start, "available_bytes", lambda ranks, room=available: room)
        start.begin(str(model), str(plan), None)
        assert start.has_begun == is_begun
        start.close()


def test_what_nobody_takes_stops_with_the_command(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, 0, 1)
    with pytest.raises(ZeroDivisionError), head_start.loading_ahead(str(model), None, None):
        raise ZeroDivisionError
    assert head_start.head_start().take() is None


def test_torch_is_not_there_yet() -> None:
    code = "import sys; import lepton_dist.runtime.head_start; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_torch_finds_its_own_threads_when_it_comes_after_our_kernels() -> None:
    """Two OpenMP libraries would be two pools of threads on the same cores."""
    code = (
        "from lepton_dist.kernels.cpu.native import native_library; native_library(); import torch; "
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout.split()) == 1, done.stdout
