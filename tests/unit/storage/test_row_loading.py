"""Rows from files into panels: the same bits as of a matrix that was read whole, whoever helps, and errors by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lepton_dist.errors import CheckpointError
from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.kernels.cpu.panels import Panels
from lepton_dist.plan.axes import Span
from lepton_dist.storage import row_loading
from lepton_dist.storage.index import CheckpointIndex
from lepton_dist.storage.row_loading import RowLoading, RowRun
from lepton_dist.storage.slices import SliceReader

pytestmark = pytest.mark.skipif(native_library() is None, reason="no compiled kernels: not built, or no AVX2")

FIRST, SECOND = 96, 70  # rows of two tensors that become one matrix: the second ends within a panel


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(200, 90, generator=generator).bfloat16() for name in ("a", "b")}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(row_loading, "_PIECE_BYTES", 6_000)  # a panel or two
    yield


def runs(directory: Path, columns: Span) -> list[RowRun]:
    index = CheckpointIndex.read(directory)
    return [
        RowRun(index["a"], Span(7, 7 + FIRST), columns, 0),
        RowRun(index["b"], Span(0, SECOND), columns, FIRST),
    ]


def load(directory: Path, kind: str, columns: Span, threads: int, *, is_begun: bool) -> torch.Tensor:
    panels = Panels(FIRST + SECOND, columns.size, kind)
    with closing(RowLoading([(run, panels) for run in runs(directory, columns)])) as loading:
        assert loading.done == 0
        if is_begun:
            loading.begin()
        loading.finish(threads)
        assert loading.done == 1
    return PanelWeight(panels).packed


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("columns", [Span(0, 90), Span(0, 64), Span(21, 90), Span(30, 31)])
@pytest.mark.parametrize(("threads", "is_begun"), [(1, False), (3, False), (1, True), (2, True)])
def test_as_a_matrix_that_was_read_whole(
    kind: str, columns: Span, threads: int, is_begun: bool, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    parts = [tensors["a"][7 : 7 + FIRST], tensors["b"][:SECOND]]
    whole = torch.cat(parts)[:, columns.start : columns.stop]
    found = load(tmp_path, kind, columns, threads, is_begun=is_begun)
    assert torch.equal(found, PanelWeight.of(whole, kind).packed)


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_of_wide_rows_only_the_wanted_columns_are_read(tmp_path: Path) -> None:
    matrix = torch.randn(70, 20_000).bfloat16()
    save_file({"wide": matrix}, tmp_path / "model.safetensors")  # which leaves it in the system's memory
    stored = CheckpointIndex.read(tmp_path)["wide"]
    for columns in (Span(0, 5000), Span(15_000, 20_000), Span(7, 2007)):
        panels = Panels(64, columns.size, "bfloat16")
        before = bytes_read()
        with closing(RowLoading([(RowRun(stored, Span(6, 70), columns, 0), panels)])) as loading:
            loading.finish(2)
        assert bytes_read() - before < 64 * columns.size * 2 + 40_000
        wanted = matrix[6:70, columns.start : columns.stop]
        assert torch.equal(PanelWeight(panels).packed, PanelWeight.of(wanted, "bfloat16").packed)
        with SliceReader(2) as reader:
            target = torch.empty(64, columns.size)
            reader.read(stored, Span(6, 70), columns, target)
            assert reader.bytes_read == 64 * columns.size * 2
        assert torch.equal(target, wanted.float())


def test_float32_rows_are_rounded_too(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    whole = torch.cat([tensors["a"][7 : 7 + FIRST], tensors["b"][:SECOND]])
    found = load(tmp_path, "int8", Span(0, 90), 2, is_begun=False)
    assert torch.equal(found, PanelWeight.of(whole, "int8").packed)


def test_no_runs_are_done_at_once() -> None:
    with closing(RowLoading([])) as loading:
        loading.begin()
        loading.finish(2)


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_file_that_ends_early_is_named(is_begun: bool, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    found, panels = runs(tmp_path, Span(0, 90)), Panels(FIRST + SECOND, 90, "int8")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(found[1].stored.offset + SECOND * 90 * 2 - 3)  # after its header was read
    with closing(RowLoading([(run, panels) for run in found])) as loading:
        if is_begun:
            loading.begin()
        with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated: 'b' ends 3 bytes early"):
            loading.finish(2)


def test_a_file_that_cannot_be_read_is_named(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    found, panels = runs(tmp_path, Span(0, 90)), Panels(FIRST + SECOND, 90, "int8")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        RowLoading([(run, panels) for run in found])
    (tmp_path / "model.safetensors").mkdir()
    with (
        closing(RowLoading([(run, panels) for run in found])) as loading,
        pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: Is a directory"),
    ):
        loading.finish(1)


def test_what_is_closed_stops(tmp_path: Path) -> None:
    """A gigabyte of rows that nobody waits for."""
    save_file({"a": torch.zeros(4096, 4096, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    stored, panels = CheckpointIndex.read(tmp_path)["a"], Panels(4096, 4096, "int4")
    loading = RowLoading([(RowRun(stored, Span(0, 4096), Span(0, 4096), 0), panels)] * 32)
    loading.begin()
    done = loading.done
    loading.close()
    assert done < 0.9
    loading.close()
