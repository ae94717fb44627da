"""The output journal: resumed after any death, exact about what is done, clear about what it refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lepton_dist.storage
from lepton_dist.errors import LeptonError, OutputError, StoppedEarly
from lepton_dist.storage.fingerprint import model_files, model_fingerprint
from lepton_dist.storage.input_rows import InputRows, read_input_rows, survey
from lepton_dist.storage.journal import Journal
from lepton_dist.storage.output_files import rows_path

PACKAGE_PARENT = Path(lepton_dist.storage.__file__).resolve().parents[2]
IDENTITY = {"model": "m1", "input": "i1"}


def key_of(line: bytes) -> tuple[str, bool] | None:
    try:
        row = json.loads(line)
        return row["id"], "error" in row
    except (ValueError, TypeError, KeyError):
        return None


def row(key: str, *, is_error: bool = False, size: int = 0) -> bytes:
    return json.dumps({"id": key, **({"error": 1} if is_error else {"text": "x" * size})}).encode() + b"\n"


def opened(path: Path, **options: Any) -> Journal:
    options.setdefault("wait_s", 0.0)
    return Journal.open(path, options.pop("identity", IDENTITY), key_of, **options)


def fill(path: Path, keys: str, errors: str = "", *, is_complete: bool = False, **options: Any) -> None:
    with opened(path, **options) as journal:
        for key in keys:
            journal.append(row(key, is_error=key in errors), key=key, is_error=key in errors)
        if is_complete:
            journal.complete()


def job_of(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.with_name(path.name + ".job.json").read_text())
    return result


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_rows_count_once_they_are_synced(path: Path) -> None:
    with opened(path) as journal:
        assert job_of(path) == {"state": "running", "identity": IDENTITY, "rows": 0}
        journal.append(row("a"), key="a", is_error=False)
        journal.append(row("b", is_error=True), key="b", is_error=True)
        assert journal.done == set()
        assert journal.sync() == 2
        assert (journal.done, journal.ok_rows, journal.error_rows) == ({"a", "b"}, 1, 1)
        assert path.read_bytes() == row("a") + row("b", is_error=True)
        assert journal.sync() == 0
    with opened(path) as journal:
        assert (journal.done, journal.ok_rows, journal.error_rows, journal.is_complete) == ({"a", "b"}, 1, 1, False)
        with pytest.raises(LeptonError, match="row a is in the output already"):
            journal.append(row("a"), key="a", is_error=False)
        journal.append(row("c"), key="c", is_error=False)
        with pytest.raises(LeptonError, match="row c is in the output already"):
            journal.append(row("c"), key="c", is_error=False)
        for line in (b"", b"x", b"x\ny\n"):
            with pytest.raises(LeptonError, match="one line"):
                journal.append(line, key="d", is_error=False)
    assert path.read_bytes().count(b"\n") == 3


def test_every_file_honours_the_umask(path: Path) -> None:
    before = os.umask(0o027)
    try:
        with opened(path):
            modes = {name: stat.S_IMODE(Path(f"{path}{name}").stat().st_mode) for name in ("", ".job.json", ".lock")}
        assert modes == {"": 0o640, ".job.json": 0o640, ".lock": 0o640}
    finally:
        os.umask(before)
    assert sorted(file.name for file in path.parent.iterdir()) == ["out.jsonl", "out.jsonl.job.json"]
    path.chmod(0o604)
    fill(path, "ab", errors="b")
    with opened(path, retry_errors=True):
        assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_complete_job_has_nothing_to_do(path: Path) -> None:
    fill(path, "ab", is_complete=True)
    assert job_of(path)["state"] == "complete"
    with opened(path) as journal:
        assert (journal.is_complete, journal.done) == (True, {"a", "b"})
        journal.complete()
    assert job_of(path)["state"] == "complete"
    # Somebody took a line out: it is not complete any more.
    path.write_bytes(row("a"))
    with opened(path) as journal:
        assert (journal.is_complete, journal.done) == (False, {"a"})
    assert job_of(path)["state"] == "running"


def test_error_rows_are_done_unless_they_are_retried(path: Path) -> None:
    fill(path, "abcd", errors="ac", is_complete=True)
    with opened(path) as journal:
        assert (journal.done, journal.ok_rows, journal.error_rows) == ({"a", "b", "c", "d"}, 2, 2)
    with opened(path, retry_errors=True) as journal:
        assert (journal.done, journal.ok_rows, journal.error_rows) == ({"b", "d"}, 2, 0)
        assert not journal.is_complete
        assert job_of(path)["state"] == "running"
        assert path.read_bytes() == row("b") + row("d")
        journal.append(row("a"), key="a", is_error=False)
    assert path.read_bytes() == row("b") + row("d") + row("a")
    assert [file.name for file in path.parent.glob("*draft*")] == []


@pytest.mark.parametrize("tail", [b'{"id": "c"', b'{"id": "c"}', b"\0" * 100, b"\xff"])
def test_a_torn_last_line_is_cut(path: Path, tail: bytes) -> None:
    fill(path, "ab", is_complete=True)
    with path.open("ab") as file:
        file.write(tail)
    with opened(path) as journal:
        assert journal.done == {"a", "b"}
        journal.append(row("c"), key="c", is_error=False)
    assert path.read_bytes() == row("a") + row("b") + row("c")


def test_lines_that_are_no_rows_and_second_rows_are_taken_out(path: Path) -> None:
    fill(path, "ab", errors="b")
    junk = b"\0\0\n" + row("b") + b"{}\n" + row("c") + b"torn"
    with path.open("ab") as file:
        file.write(junk)
    with opened(path) as journal:
        assert (journal.done, journal.ok_rows, journal.error_rows) == ({"a", "b", "c"}, 2, 1)
    assert path.read_bytes() == row("a") + row("b", is_error=True) + row("c")


def test_another_run_is_refused_field_by_field(path: Path) -> None:
    fill(path, "ab")
    other = {"model": "m2", "input": "i1", "dtype": "bfloat16"}
    with pytest.raises(OutputError, match=r"dtype was not given, now bfloat16; model was m1, now m2\. .*--overwrite"):
        opened(path, identity=other)
    assert path.read_bytes() == row("a") + row("b")
    with opened(path, identity=other, overwrite=True) as journal:
        assert journal.done == set()
    assert path.read_bytes() == b""
    assert job_of(path)["identity"] == other
    # Without rows there is nothing to mix up.
    with opened(path):
        assert job_of(path)["identity"] == IDENTITY


def test_an_output_of_unknown_origin_is_refused(path: Path) -> None:
    path.write_bytes(row("a"))
    with pytest.raises(OutputError, match=r"out\.jsonl\.job\.json is not beside it.*--overwrite"):
        opened(path)
    assert path.read_bytes() == row("a")
    for content in ("nonsense", '{"state": "odd", "identity": {}}'):
        Path(f"{path}.job.json").write_text(content)
        with pytest.raises(OutputError, match=r"job\.json: .*--overwrite"):
            opened(path)
    with opened(path, overwrite=True) as journal:
        assert journal.done == set()
    path.write_bytes(b"")
    Path(f"{path}.job.json").unlink()
    opened(path).close()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for place, reason in {
        tmp_path: "is a directory",
        tmp_path / "absent" / "out": "absent does not exist; create it first",
        Path("/dev/null"): "not a regular file",
        Path("/proc/out.jsonl"): "cannot be written",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        with pytest.raises(OutputError, match=reason):
            opened(place)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OutputError, match="leads back to itself"):
        opened(loop)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", "a")
    assert (tmp_path / "real").read_bytes() == row("a")
    assert (tmp_path / "real.job.json").exists()


def test_a_second_live_writer_is_refused_and_named(path: Path) -> None:
    with opened(path):
        start = time.monotonic()
        with pytest.raises(OutputError, match=rf"out\.jsonl: another run .*process {os.getpid()} on "):
            opened(path, wait_s=0.3)
        assert 0.25 < time.monotonic() - start < 3
        with pytest.raises(OutputError, match="another run"):
            opened(path, overwrite=True)
    opened(path).close()


def test_what_lies_in_a_locks_place_is_never_written_into(path: Path) -> None:
    victim, lock = path.with_name("victim"), path.with_name("out.jsonl.lock")
    victim.write_text("precious")
    lock.symlink_to(victim)
    with pytest.raises(OutputError, match=r"out\.jsonl\.lock: is a link.*remove it"):
        opened(path)
    lock.unlink()
    lock.write_text("notes of mine\n")
    with pytest.raises(OutputError, match=r"out\.jsonl\.lock: exists, and is not the lock of a run"):
        opened(path)
    assert (victim.read_text(), lock.read_text()) == ("precious", "notes of mine\n")
    assert not path.exists()
    lock.write_text(f"{os.getpid()} on host-1\n")  # what a killed run leaves behind
    opened(path).close()
    assert not lock.exists()


def rows_of(text: str) -> InputRows:
    """An input of one row a letter: its key is the letter without its case."""
    return survey([letter.encode() for letter in text], lambda line, number: line.decode().lower())


def test_an_input_may_change_where_no_row_is_answered(path: Path) -> None:
    def fill_from(text: str, keys: str, errors: str = "", **options: Any) -> set[str]:
        rows = rows_of(text)
        with opened(path, identity={"model": "m", "input": rows.digest}, rows=rows, **options) as journal:
            for key in keys:
                journal.append(row(key, is_error=key in errors), key=key, is_error=key in errors)
            assert job_of(path)["identity"]["input"] == rows.digest
            assert read_input_rows(rows_path(path)) is not None
            return set(journal.done)

    fill_from("abc", "ab", errors="b")
    assert fill_from("aBC", "", retry_errors=True) == {"a"}  # b is corrected, c has changed
    fill_from("aBCde", "bc")
    before = path.read_bytes()
    for text, changed in (("ABCde", 1), ("Abcde", 3)):
        with pytest.raises(OutputError, match=rf"answers of {changed} row\(s\) of the input that have changed"):
            fill_from(text, "")
        assert path.read_bytes() == before
    rows = rows_of("aB")
    with opened(path, identity={"model": "m", "input": rows.digest}, rows=rows) as journal:
        assert journal.num_gone == 1
    # Without what the rows were, as an earlier version left it, the input must be the same.
    rows_path(path).unlink()
    with pytest.raises(OutputError, match=r"input was .*, now"):
        fill_from("aBCde", "")
    with pytest.raises(OutputError, match="model was m, now m2"):
        opened(path, identity={"model": "m2", "input": rows.digest}, rows=rows)


def test_a_start_that_died_between_its_two_files_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*arguments: Any) -> None:
        raise SystemExit

    first, second = rows_of("abc"), rows_of("abcd")
    with opened(path, identity={"input": first.digest}, rows=first) as journal:
        journal.append(row("a"), key="a", is_error=False)
    monkeypatch.setattr("lepton_dist.storage.journal.write_job", dying)
    with pytest.raises(SystemExit):
        opened(path, identity={"input": second.digest}, rows=second)
    monkeypatch.undo()
    with opened(path, identity={"input": second.digest}, rows=second) as journal:
        assert journal.done == {"a"}


CHILD = """
import json, os, random, resource, sys, time
from lepton_dist.errors import LeptonError
from lepton_dist.storage.input_rows import InputRows, read_input_rows, survey
from lepton_dist.storage.journal import Journal
from lepton_dist.storage.output_files import rows_path

def key_of(line):
    try:
        row = json.loads(line)
        return row["id"], "error" in row
    except (ValueError, TypeError, KeyError):
        return None

path, seed, limit, retry = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "retry"
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
chance = random.Random(seed)
def say(*words):
    os.write(1, (" ".join(words) + "\\n").encode())
try:
    with Journal.open(path, {"run": "1"}, key_of, retry_errors=retry, wait_s=5) as journal:
        say("open")
        todo = [str(n) for n in range(3000) if str(n) not in journal.done]
        for key in todo:
            is_error = int(key) % 7 == 0 and not retry
            row = {"id": key, **({"error": "e"} if is_error else {"text": "x" * chance.randrange(3000)})}
            journal.append(json.dumps(row).encode() + b"\\n", key=key, is_error=is_error)
            if chance.random() < 0.2:
                journal.sync()
                say("sync", str(len(journal.done)))
                time.sleep(0.0004)  # spreads the work over more kills
        journal.complete()
        say("complete")
except LeptonError as error:
    say(type(error).__name__, str(error))
    sys.exit(error.exit_code)
"""


def child(path: Path, seed: int, *, limit: int = 0, retry: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(path), str(seed), str(limit), "retry" if retry else "keep"]
    # A child finds the same package, wherever the tests were started.
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PACKAGE_PARENT)


def whole_rows(path: Path) -> list[str]:
    """The keys in an output, whatever state a killed writer left it in."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    keys = [key_of(line) for line in lines]
    assert None not in keys
    return [key[0] for key in keys if key is not None]


def test_killed_at_any_moment_no_row_is_lost_or_doubled(path: Path) -> None:
    chance = random.Random(5)
    promised = 0
    for attempt in range(60):
        process = child(path, attempt)
        assert process.stdout is not None
        # Half of the kills fall into start and recovery, half some way into the writing.
        if attempt % 2:
            process.stdout.readline()
        time.sleep(chance.random() * 0.08)
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split("\n")
        process.wait()
        process.stdout.close()
        promised = max([promised, *(int(line.split()[1]) for line in said if line.startswith("sync"))])
        keys = whole_rows(path)
        assert len(set(keys)) == len(keys) >= promised
        if "complete" in said:
            break
    assert child(path, 99).wait() == 0
    assert Counter(whole_rows(path)) == Counter(str(n) for n in range(3000))
    assert job_of(path)["state"] == "complete"


def test_killed_while_error_rows_are_taken_out(path: Path) -> None:
    process = child(path, 1)
    assert process.wait() == 0
    chance = random.Random(6)
    for attempt in range(10):
        process = child(path, attempt, retry=True)
        time.sleep(0.05 + chance.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.wait()
        keys = whole_rows(path)
        assert len(set(keys)) == len(keys) >= 2571
        # It never calls itself complete with rows missing.
        assert job_of(path)["state"] == "running" or len(keys) == 3000
    assert child(path, 99, retry=True).wait() == 0
    with opened(path, identity={"run": "1"}) as journal:
        assert (journal.is_complete, journal.ok_rows, journal.error_rows) == (True, 3000, 0)
    assert [file.name for file in path.parent.glob("*draft*")] == []


def test_a_complete_job_is_running_again_before_rows_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, "abc", errors="b", is_complete=True)

    def dying(*arguments: Any, **options: Any) -> None:
        assert job_of(path)["state"] == "running"
        raise SystemExit

    monkeypatch.setattr("lepton_dist.storage.journal.replace_file", dying)
    with pytest.raises(SystemExit):
        opened(path, retry_errors=True)
    monkeypatch.undo()
    with opened(path) as journal:
        assert (journal.done, journal.is_complete) == ({"a", "b", "c"}, False)


def test_a_full_disk_stops_the_job_and_it_resumes(path: Path) -> None:
    kept = 0
    for limit in (100_000, 1_500_001, 2_000_003):
        process = child(path, limit, limit=limit)
        assert process.stdout is not None
        last = process.stdout.read().strip().split("\n")[-1]
        assert process.wait() == 75, last
        assert last.startswith("StoppedEarly")
        assert f"(after {len(whole_rows(path))} rows)" in last
        assert "give the same command again to resume" in last
        # The rows that fitted are there, whole, and nothing after them.
        assert path.read_bytes().endswith(b"\n")
        assert limit - 5000 < path.stat().st_size <= limit
        assert len(whole_rows(path)) > kept
        kept = len(whole_rows(path))
    assert child(path, 1).wait() == 0
    assert Counter(whole_rows(path)) == Counter(str(n) for n in range(3000))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_rows_that_cannot_be_made_durable_are_taken_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    journal = opened(path)
    journal.append(row("a"), key="a", is_error=False)
    journal.sync()
    journal.append(row("b"), key="b", is_error=False)
    with monkeypatch.context() as patch:

        def full(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        patch.setattr(os, "fsync", full)
        with pytest.raises(StoppedEarly, match=os.strerror(code)):
            journal.sync()
    assert path.read_bytes() == row("a")
    # It stays failed: whoever goes on writing is told again, and closing does not try.
    with pytest.raises(StoppedEarly):
        journal.append(row("c"), key="c", is_error=False)
    journal.close()
    with opened(path) as journal:
        assert journal.done == {"a"}


def test_a_large_batch_reaches_the_file_before_the_sync(path: Path) -> None:
    with opened(path) as journal:
        for key in "abc":
            journal.append(row(key, size=600_000), key=key, is_error=False)
        assert path.stat().st_size > 1_000_000
        assert journal.done == set()


def test_model_fingerprints_follow_content_only(tmp_path: Path) -> None:
    def model(name: str, more: Mapping[str, bytes] = {}, **changed: bytes) -> str:
        directory = tmp_path / name
        directory.mkdir()
        files = {"config.json": b"{}", "tokenizer.json": b"{1}", "model.safetensors": bytes(2000), "README.md": b"hi"}
        renamed = {name.replace("_", "."): value for name, value in changed.items()}
        for file, content in (files | renamed | more).items():
            (directory / file).write_bytes(content)
        return model_fingerprint(directory)

    base = model("a")
    assert base == model("b", README_md=b"other", out_jsonl=b"x")
    assert len({base, model("c", config_json=b"{ }"), model("d", model_safetensors=bytes(1999) + b"1")}) == 3
    # What a run or another tool writes there is no part of it, nor are weights beside the single file.
    for name in ("out.jsonl.job.json", "out.jsonl.report.json", "results.json", "more.safetensors", "pytorch.bin"):
        (tmp_path / "a" / name).write_text("{}")
        assert model_fingerprint(tmp_path / "a") == base
    for number, name in enumerate(("generation_config.json", "added_tokens.json", "chat_template.jinja")):
        assert model(f"f{number}", {name: b"{}"}) != base


def test_the_files_that_must_not_be_written_over(tmp_path: Path) -> None:
    mine = ["config.json", "tokenizer.model", "old.bin", "processor_config.json", "model.safetensors.index.json"]
    for name in (*mine, "results.jsonl.report.json", "prompts.jsonl", "results.json"):
        (tmp_path / name).touch()
    assert {path.name for path in model_files(tmp_path)} == set(mine)


def test_large_weights_are_sampled_fast(tmp_path: Path) -> None:
    size = 20_000_000_000
    for number in range(5):
        with (tmp_path / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(size)
    start = time.monotonic()
    base = model_fingerprint(tmp_path)
    assert time.monotonic() - start < 2
    for offset in (100, size - 1):
        with (tmp_path / "model-3.safetensors").open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
        changed = model_fingerprint(tmp_path)
        assert changed != base
        base = changed


def test_fingerprints_name_what_they_cannot_read(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(LeptonError, match=r"holds no \*\.safetensors file"):
            model_fingerprint(directory)
