"""Runs the checks of `gpu_checks` that are due, in a slice of time, and writes their table; see `launch/gpu-check`."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import msgspec
import torch

from lepton_dist.bench.gpu_checks import CHECKS, GpuCheck, Record, due, judge, table, with_table
from lepton_dist.comm.devices import has_gpus
from lepton_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, UsageError

# A check may take this long: a slice that has less left leaves it to the next.
_LEAST_S = 60.0


def run_command(check: GpuCheck, root: Path, seconds: float) -> tuple[int | None, str]:
    """Run a check's command: its exit code, None past the time, and its output."""
    try:
        done = subprocess.run(
            [sys.executable, *check.arguments],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return None, str(error.stdout or "")
    return done.returncode, done.stdout


class State:
    """The records of a machine, in a file that every check rewrites, so that a slice can be cut anywhere."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: dict[str, Record] = {}
        if path.is_file():
            try:
                self.records = msgspec.json.decode(path.read_bytes(), type=dict[str, Record])
            except msgspec.DecodeError as error:
                raise UsageError(f"{path}: is no state of gpu-check ({error}); remove it to begin anew") from None

    def put(self, name: str, record: Record) -> None:
        """Keep what became of a check."""
        self.records[name] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".new")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(self.records)))
        draft.replace(self._path)


def run_slice(
    checks: Sequence[GpuCheck],
    state: State,
    seconds: float,
    execute: Callable[[GpuCheck, float], tuple[int | None, str]],
    versions: str,
    say: Callable[[str], None],
) -> bool:
    """Run `checks` until `seconds` are over; whether all had their turn.

    A check is cut to what is left of the slice, and counts as failed then: only the first may find less than its own
    limit, in a slice that is too short for it.
    """
    end = time.monotonic() + seconds
    for number, check in enumerate(checks):
        left = end - time.monotonic()
        if number and left < max(_LEAST_S, min(check.limit_s, seconds)):
            return False
        say(f"{check.name}: {check.statement}")
        code, output = execute(check, min(left, check.limit_s))
        result, is_good = judge(check, code, output)
        if not is_good:
            say(output[-4000:])
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        state.put(check.name, Record(result, is_good, versions, today))
        say(f"{check.name}: {result}")
    return True


def versions_here() -> str:
    """The device and the versions that figures depend on."""
    found = [torch.cuda.get_device_name(0)] if has_gpus() else []
    found.append(f"torch {torch.__version__}")
    for package in ("triton", "cupy-cuda13x", "cupy-cuda12x", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "transformers"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main(arguments: Sequence[str]) -> int:
    """Run a slice. Exit code 0: all has been run. 70: some of it failed. 75: start again. 2: it cannot run here."""
    parser = argparse.ArgumentParser(prog="launch/gpu-check", description=__doc__)
    parser.add_argument("--seconds", type=float, default=570.0, help="how long this slice may take (570)")
    parser.add_argument("--only", action="append", metavar="NAME", help="run this check, again if need be; repeatable")
    parser.add_argument("--list", action="store_true", help="show the checks and what became of them, and run nothing")
    parser.add_argument("--state", default="results/gpu-check.json", help="where results are kept between slices")
    chosen = parser.parse_args(arguments)
    root = Path(__file__).parents[2]
    page = root / "docs" / "gpu.md"
    try:
        state = State(root / chosen.state)
        if chosen.list:
            for check in CHECKS:
                record = state.records.get(check.name)
                print(f"{check.name:10} {record.result if record else 'to be run'}")
            return EXIT_DONE
        unknown = set(chosen.only or ()) - {check.name for check in CHECKS}
        if unknown:
            raise UsageError(f"--only {min(unknown)}: unknown; known: {', '.join(check.name for check in CHECKS)}")
        if not has_gpus():
            raise UsageError("no GPU is seen: check nvidia-smi, CUDA_VISIBLE_DEVICES, and that torch is a CUDA build")
    except UsageError as error:
        print(f"launch/gpu-check: {error}", file=sys.stderr)
        return EXIT_USAGE
    num_gpus = torch.cuda.device_count()
    wanted = [check for check in CHECKS if check.name in chosen.only] if chosen.only else []
    todo = wanted or due(CHECKS, state.records, num_gpus)

    def execute(check: GpuCheck, seconds: float) -> tuple[int | None, str]:
        return run_command(check, root, seconds)

    is_done = run_slice(todo, state, chosen.seconds, execute, versions_here(), lambda text: print(text, flush=True))
    page.write_text(with_table(page.read_text(encoding="utf-8"), table(CHECKS, state.records)), encoding="utf-8")
    print(f"{page.relative_to(root)} is written" + ("" if is_done else "; start again to go on"))
    if not is_done:
        return EXIT_STOPPED
    return EXIT_DONE if all(record.is_good for record in state.records.values()) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
