"""Files that are read more than once: what cannot be is refused at once, and two names of one file are known."""

from __future__ import annotations

import os
import socket
from itertools import pairwise
from pathlib import Path

import pytest

from lepton_dist.documents import parse_yaml, read_yaml
from lepton_dist.errors import ConfigError
from lepton_dist.files import is_same_file, open_regular, read_regular


def test_what_can_be_read_only_once_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo, name = tmp_path / "fifo", tmp_path / "socket"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(name))
        read_end, write_end = os.pipe()
        os.write(write_end, b"rows")
        for path, kind in ((fifo, "a pipe"), (Path(f"/dev/fd/{read_end}"), "a pipe"), (Path("/dev/null"), "a device")):
            with pytest.raises(OSError, match=f"it is {kind}.*save it to a file"):
                open_regular(path)
        with pytest.raises(OSError, match="No such device"):  # the kernel's own word for sockets
            open_regular(name)
        assert os.read(read_end, 10) == b"rows"  # nothing was taken out of it
        os.close(read_end)
        os.close(write_end)


def test_regular_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert read_regular(path) == b"abc"
    for absent, error in ((tmp_path / "absent", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error):
            open_regular(absent)


def test_one_file_of_several_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "soft").symlink_to("a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    (tmp_path / "b").write_text("x")
    (tmp_path / "dangling").symlink_to("later")
    for one, other, same in (
        ("a", "soft", True),
        ("hard", "soft", True),
        ("a", "b", False),
        ("later", "dangling", True),
        ("later", "./later", True),
        ("later", "a", False),
    ):
        assert is_same_file(tmp_path / one, f"{tmp_path}/{other}") == same, (one, other)


# Ten million values in a few hundred bytes.
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: " + "[" * 5000, "nests too deep|not valid YAML"),
        ("a: &x [*x]", "nests too deep, or an alias holds itself"),
        ("a: 2026-02-30", "spoilt:1: a: is no value: day is out of range"),
        ("b: 1\na: " + "9" * 5000, "spoilt:2: a: is no value"),
        ("a: !!python/name:os.system x", "not valid YAML"),
        (ALIASES, "more than 1000000 values"),
    ],
    ids=["nested", "itself", "no date", "long number", "object", "aliases"],
)
def test_yaml_that_breaks_its_reader_is_an_error_with_a_place(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_yaml(text, "spoilt")


def test_a_pipe_is_no_yaml_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.yaml")
    with pytest.raises(ConfigError, match=r"plan\.yaml: cannot be read: it is a pipe"):
        read_yaml(tmp_path / "plan.yaml")
