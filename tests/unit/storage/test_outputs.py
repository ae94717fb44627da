"""What a command writes: never over what it reads, whole or not at all, and never through a planted link."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lepton_dist.errors import OutputError
from lepton_dist.storage.durable import draft_of, replace_file
from lepton_dist.storage.outputs import refuse_overwriting, write_output


def test_an_output_that_is_an_input_is_refused_by_any_name(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (tmp_path / "in", model / "config.json"):
        file.write_text("x")
    (tmp_path / "soft").symlink_to("in")
    (tmp_path / "hard").hardlink_to(tmp_path / "in")
    (tmp_path / "tensors").symlink_to(model / "config.json")
    read = {"the input": tmp_path / "in", "the model": model, "the plan": None}
    for name in ("in", "soft", "hard", "./in", "model/../in"):
        with pytest.raises(OutputError, match=r"the output would overwrite the input .*both name the same file"):
            refuse_overwriting({"the output": f"{tmp_path}/{name}"}, read)
    with pytest.raises(OutputError, match="the log would overwrite a file of the model"):
        refuse_overwriting({"the output": tmp_path / "out", "the log": tmp_path / "tensors"}, read)
    with pytest.raises(OutputError, match="the log would overwrite the output"):
        refuse_overwriting({"the output": tmp_path / "out", "the log": f"{tmp_path}/./out"}, read)
    refuse_overwriting({"the output": tmp_path / "out", "the log": None}, read)


def test_a_file_is_replaced_in_one_step_through_links_and_with_its_mode(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    write_output(target, "one")
    target.chmod(0o640)
    link.symlink_to(target)
    with target.open() as reader:
        write_output(link, b"two")
        assert reader.read() == "one"  # who reads meanwhile sees no half of it
    assert link.is_symlink() and target.read_text() == "two"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    before = os.umask(0o027)
    try:
        write_output(tmp_path / "new" / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == 0o640


def test_a_link_planted_in_a_drafts_place_leads_nowhere(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "report.json"
    victim.write_text("precious")
    victim.chmod(0o644)
    draft_of(path).symlink_to(victim)
    replace_file(path, [b"report"])
    assert victim.read_text() == "precious" and stat.S_IMODE(victim.stat().st_mode) == 0o644
    assert path.read_bytes() == b"report" and not path.is_symlink()


def test_devices_are_written_as_they_are(tmp_path: Path) -> None:
    write_output("/dev/null", "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(OutputError, match="/dev/full: cannot be written: No space left"):
        write_output("/dev/full", "x")
