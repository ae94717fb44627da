"""An input that has changed: which rows are still those that were answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lepton_dist.errors import OutputError
from lepton_dist.storage.input_rows import (
    InputRows,
    compare,
    hash_keys,
    read_input_rows,
    survey,
    write_input_rows,
)
from lepton_dist.text.dialects import key_of_input, read_rows


def lines(*rows: object) -> list[bytes]:
    return [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]


def surveyed(*rows: object) -> InputRows:
    return survey(lines(*rows), key_of_input)


A, B, C = {"id": "a", "prompt": "1"}, {"id": 2, "prompt": "2"}, {"custom_id": "c", "body": {}}


def test_changes_of_rows_with_and_without_an_answer() -> None:
    before = surveyed(A, B, C, {"prompt": "4"})
    answered = hash_keys(["s:a", "i:2", "line:4"])
    for now, changed, gone in (
        ((A, B, C, {"prompt": "4"}), 0, 0),
        ((A, B, {"custom_id": "c", "body": {"n": 1}}, {"prompt": "4"}, {"id": 9}), 0, 0),  # no answer yet, and added
        ((A, {**B, "prompt": "3"}, C, {"prompt": "4"}), 1, 0),
        ((B, A, C, {"prompt": "4"}), 0, 0),  # moved: they have names
        ((A, B, {"prompt": "4"}), 0, 1),  # a row without a name is known by its line, and so has gone ...
        ((C, A, B, {"prompt": "4"}), 0, 0),
        ((A, B, C, {"id": 7, "prompt": "7"}, {"prompt": "4"}), 0, 1),
        ((A, B, C, {"prompt": "5"}), 1, 0),  # ... or is another one
        ((b"not JSON\n", B), 0, 2),
        ((), 0, 3),
    ):
        assert compare(before, surveyed(*now), answered) == (changed, gone), now


def test_a_name_that_occurs_again_counts_where_it_is_first() -> None:
    twice = surveyed(A, {**A, "prompt": "other"})
    answered = hash_keys(["s:a"])
    assert compare(twice, surveyed(A), answered) == (0, 0)
    assert compare(twice, surveyed({**A, "prompt": "other"}), answered) == (1, 0)


def test_the_end_of_a_line_and_blank_lines_do_not_count() -> None:
    one = survey([b"\xef\xbb\xbf" + lines(A)[0], b"\n", lines(B)[0].rstrip()], key_of_input)
    other = survey([lines(A)[0].replace(b"\n", b"\r\n"), b" \n", *lines(B, C)], key_of_input)
    assert (len(one), len(other)) == (2, 3) and one.digest != other.digest
    assert compare(one, other, hash_keys(["s:a", "i:2"])) == (0, 0)


def test_keys_are_those_that_rows_get() -> None:
    rows = lines(
        A,
        B,
        {"id": None, "prompt": "x"},
        {"prompt": "x"},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}},
        {"id": True, "prompt": "x"},
        b"[]\n",
        b"nonsense\n",
        b"\xff\n",
        {"id": "ö", "prompt": ""},
    )
    read = [row.key for row in read_rows(rows, is_text=False)]
    assert [key_of_input(line, number) for number, line in enumerate(rows, 1)] == read


def test_the_file_of_them(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert read_input_rows(path) is None
    for rows in (surveyed(A, B, C), surveyed()):
        write_input_rows(path, rows)
        again = read_input_rows(path)
        assert again is not None and again.digest == rows.digest
        assert again.keys.tolist() == rows.keys.tolist() and again.contents.tolist() == rows.contents.tolist()
    for data in (b"", b"x" * 100, path.read_bytes() + b"1"):
        path.write_bytes(data)
        with pytest.raises(OutputError, match="start anew with --overwrite"):
            read_input_rows(path)
