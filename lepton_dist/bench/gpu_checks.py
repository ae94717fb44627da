"""What is to be shown on a GPU, most important first: statements, commands that show them, and targets. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

NOT_YET = "not yet measured"
BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"


@dataclass(frozen=True)
class GpuCheck:
    """One statement about GPUs. `arguments` are those of Python; a figure is wanted to be at least `target`.

    Without a target the command is a test, which passes or fails. It needs `gpus` GPUs and may take `limit_s` seconds.
    """

    name: str
    statement: str
    arguments: tuple[str, ...]
    target: float | None = None
    gpus: int = 1
    limit_s: float = 540.0

    @property
    def command(self) -> str:
        """As a person would type it."""
        return shlex.join(("python", *self.arguments))


class Record(msgspec.Struct, frozen=True):
    """What became of a check: `result` in words, and the versions that it ran with."""

    result: str
    is_good: bool
    versions: str
    date: str


def _test(name: str, statement: str, target: str, gpus: int = 1) -> GpuCheck:
    return GpuCheck(name, statement, ("-m", "pytest", "-q", "-rs", "-m", "", f"tests/gpu/{target}"), gpus=gpus)


def _figure(name: str, statement: str, target: float, *arguments: str) -> GpuCheck:
    return GpuCheck(name, statement, ("-m", "lepton_dist.bench.gpu_figures", *arguments), target)


CHECKS: tuple[GpuCheck, ...] = (
    _test("kernels", "The Triton kernels give the torch path's results", "test_kernels.py"),
    _test("one-rank", "Every family gives transformers' text on one GPU rank", "test_equality.py::test_one_rank"),
    _figure(
        "decode-1",
        "Decode at batch 1, Llama-3-8B shape, bf16, context 1,024: at least 85 % of the copy bandwidth",
        0.85,
        *("decode", "--batch", "1", "--context", "1024"),
    ),
    _figure(
        "decode-64",
        "The same at batch 64: at least 70 %",
        0.70,
        *("decode", "--batch", "64", "--context", "1024"),
    ),
    _figure(
        "prefill-8k",
        "Prefill of 8,192 tokens, the same shape: at least 65 % of the bf16 matmul peak",
        0.65,
        *("prefill", "--context", "8192"),
    ),
    _test("shared", "2 ranks share one GPU, staged: every family's text", "test_equality.py::test_shared_gpu"),
    _test("mixed", "A CPU rank and a GPU rank in one pipeline: every family's text", "test_equality.py::test_mixed"),
    _figure(
        "offline",
        "Offline batch, the same shape: at least 3 times transformers' continuous batching",
        3.0,
        "offline",
    ),
    _test("nccl", "NCCL, one rank: all-reduce, send/recv to self in a group call, capture in a graph", "test_nccl.py"),
    _test(
        "session",
        "KV cache sized after a rehearsal, errors told, graphs equal eager steps",
        "test_session.py",
    ),
    _test("rank-loss", "A lost rank ends in a named error on the others, staged", "test_rank_loss.py::test_staged"),
    _test(
        "two-gpus",
        "NCCL between GPUs: tensor parallelism and pipelines over 2 GPUs give every family's text",
        "test_equality.py::test_two_gpus",
        gpus=2,
    ),
    _test("nccl-loss", "A lost rank ends in a named error, over NCCL", "test_rank_loss.py::test_nccl", gpus=2),
)


def due(checks: Sequence[GpuCheck], records: Mapping[str, Record], num_gpus: int) -> list[GpuCheck]:
    """The checks that are still to be run here: new ones in their order, then those that failed, once more."""
    possible = [check for check in checks if check.gpus <= num_gpus]
    new = [check for check in possible if check.name not in records]
    return new + [check for check in possible if check.name in records and not records[check.name].is_good]


def judge(check: GpuCheck, code: int | None, output: str) -> tuple[str, bool]:
    """The result of a command, in words, and whether it is one; `code` is None for one that ran past its limit."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "no output"
    if code is None:
        return f"ran past its limit of {check.limit_s:g} s", False
    if code != 0:
        return f"failed ({code}): {last.strip('= ')}", False
    if check.target is None:
        # A test that was skipped has shown nothing.
        is_shown = " passed" in last and " skipped" not in last
        return last.strip("= "), is_shown
    try:
        found = msgspec.json.decode(last, type=dict[str, object])
        value, text = float(str(found["value"])), str(found["text"])
    except (msgspec.DecodeError, KeyError, ValueError):
        return f"no figure in {last!r}", False
    return (text, True) if value >= check.target else (f"{text}; below the target of {check.target:g}", True)


def table(checks: Sequence[GpuCheck], records: Mapping[str, Record]) -> str:
    """The table of `docs/gpu.md`, in Markdown."""
    rows = ["| statement | measured | versions | command |", "|---|---|---|---|"]
    for check in checks:
        record = records.get(check.name)
        result = NOT_YET if record is None else f"{record.result} ({record.date})"
        versions = "" if record is None else record.versions
        cells = (check.statement, result, versions, f"`{check.command}`")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def with_table(document: str, rows: str) -> str:
    """The document with the table between its marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"
