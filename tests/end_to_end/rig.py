"""What the end-to-end tests share: inputs, broken copies of the example model, and `generate` as a user types it."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.harness import OPENMPI_SETTINGS, Job, environment

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "examples" / "tiny-stdlib"
GENERATE = ("-m", "lepton_dist.cli.main", "generate")

Row = dict[str, Any]


def write_rows(path: Path, rows: Iterable[Row | bytes]) -> Path:
    """A JSON Lines file; a row given as bytes is written as it is."""
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def read_rows(path: Path) -> list[Row]:
    """The rows of an output, which must be whole lines of JSON."""
    text = path.read_bytes()
    assert text.endswith(b"\n") or not text, text[-200:]
    return [json.loads(line) for line in text.splitlines()]


def by_key(rows: Sequence[Row]) -> dict[str, Row]:
    """Output rows by what they answer; a row that is there twice fails."""
    found: dict[str, Row] = {}
    for row in rows:
        key = f"line {row['line']}" if "line" in row else repr(row["id"])
        assert key not in found, f"{key} is there twice"
        found[key] = row
    return found


def arguments(model: Path, source: Path, output: Path, *options: str | Path) -> list[str]:
    """The options of `generate`."""
    return ["--model", str(model), "--input", str(source), "--output", str(output), *map(str, options)]


def generate(model: Path, source: Path, output: Path, *options: str | Path) -> list[str]:
    """The Python arguments of `lepton-dist generate`."""
    return [*GENERATE, *arguments(model, source, output, *options)]


def plan(path: Path, mesh: str, **engine: object) -> Path:
    """A plan file in the short form."""
    lines = [f"mesh: {{{mesh}}}"]
    if engine:
        lines.append("engine: {" + ", ".join(f"{name}: {value}" for name, value in engine.items()) + "}")
    path.write_text("\n".join(lines) + "\n")
    return path


def copy_model(folder: Path) -> Path:
    """A copy of the example model that may be broken."""
    folder.mkdir()
    for file in MODEL.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes a key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file; its data stay as they are."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rank_pids(job: Job, num_ranks: int, seconds: float = 20.0) -> list[int]:
    """The process ids of a job's ranks, in rank order, as soon as all have started."""
    end = time.monotonic() + seconds
    while True:
        found: dict[int, int] = {}
        for pid in job.pids():
            rank = _rank_of(pid)
            if rank is not None:
                found[rank] = pid
        if len(found) == num_ranks:
            return [found[rank] for rank in range(num_ranks)]
        assert time.monotonic() < end, f"only ranks {sorted(found)} are there\n{job.stderr}"
        time.sleep(0.02)


def wait_for_guardian(job: Job, pid: int) -> None:
    """Wait until a rank's guardian is on duty; before that nobody sees a stopped rank."""
    guardian = f"/proc/{pid}/task/{pid}/children"
    wait_for(lambda: bool(Path(guardian).read_text()), job, "the rank has a guardian")
    child = int(Path(guardian).read_text().split()[0])
    # It ignores signals as its first act, and then sleeps between its looks at the rank.
    wait_for(
        lambda: "SigIgn:\t0000000000000000" not in _status(child) and "(sleeping)" in _status(child), job, "on duty"
    )


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def _rank_of(pid: int) -> int | None:
    """The rank that a process is; None for launchers and guardians."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if b"python" not in words[0] or b"lepton_dist.cli.main" not in words or b"-n" in words:
        return None
    for variable in variables:
        if match := re.fullmatch(rb"(?:PMI_RANK|OMPI_COMM_WORLD_RANK|SLURM_PROCID)=(\d+)", variable):
            return int(match[1])
    return None


def wait_for(is_so: Callable[[], bool], job: Job, what: str, seconds: float = 40.0) -> None:
    """Wait for something to be so while a job runs."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not within {seconds} s: {what}\n{job.stdout}{job.stderr}"
        assert job.process.poll() is None or is_so(), f"the job ended before: {what}\n{job.stdout}{job.stderr}"
        time.sleep(0.01)


def num_lines(path: Path) -> int:
    """Whole lines of a file that need not exist yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


@contextmanager
def launched(
    ranks: int, words: Sequence[str], *, python: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Job]:
    """A running ``python WORDS`` under launch/mpirun, with the mpirun beside `python` (this one). Killed at the end.

    What Open MPI needs here is for launch/mpirun to know.
    """
    chosen = python or Path(sys.executable)
    command = [str(ROOT / "launch" / "mpirun"), "-n", str(ranks), str(chosen), *words]
    with tempfile.TemporaryDirectory(prefix="lepton-job-") as name:
        marks = {"LEPTON_TEST_JOB": name, "MPIRUN": str(chosen.parent / "mpirun")}
        variables = {key: value for key, value in environment(env).items() if key not in OPENMPI_SETTINGS}
        job = Job(command, {**variables, **marks}, Path(name), ROOT)
        try:
            yield job
        finally:
            job.kill()


READY = "lepton-dist: llama, weights"
"""What rank 0 says when all ranks have loaded."""


def workload(path: Path, num_rows: int = 96, num_long: int = 12) -> Path:
    """Rows of many kinds: long prompts first, then short ones, greedy and sampled, with bad rows among them."""
    ids = random.Random(7)
    rows: list[Row | bytes] = []
    for number in range(num_rows):
        row: Row = {"id": number if number % 3 else f"{number}", "max_tokens": 40, "ignore_eos": True}
        if number < num_long:
            row |= {"prompt_token_ids": [ids.randrange(4096) for _ in range(900)], "max_tokens": 3}
        else:
            row["prompt"] = f"def f{number}(self, value):\n    "
        if number % 2:
            row |= {"temperature": 0.9, "top_p": 0.95}
        if number % 8 == 1:
            row["seed"] = number
        rows.append(row)
    rows[20:20] = [b"{broken\n", {"id": "empty", "prompt": ""}, {"id": 1, "prompt": "an id that was used"}]
    rows[40:40] = [{"id": "far", "prompt_token_ids": [5] * 3000}, b'{"id": "no utf-8", "prompt": "\xff"}\n']
    return write_rows(path, rows)


NUM_BAD = 5
"""How many rows of `workload` are bad."""

SETTINGS = ("--dtype", "float32", "--temperature", "0", "--seed", "3", "--return-token-ids")
"""Options that make the results of `workload` the same under every plan."""
