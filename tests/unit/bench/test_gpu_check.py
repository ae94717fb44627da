"""The command that measures GPUs: its order, its slices, its judgement, its table, and the figures' programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from lepton_dist.bench import gpu_figures
from lepton_dist.bench.gpu_check import State, run_slice
from lepton_dist.bench.gpu_checks import BEGIN, CHECKS, END, NOT_YET, GpuCheck, Record, due, judge, table, with_table

ROOT = Path(__file__).parents[3]
GOOD, BAD = Record("3 passed", True, "torch", "2026-01-01"), Record("failed (1)", False, "torch", "2026-01-01")
TEST, FIGURE = GpuCheck("test", "it works", ("-c", "")), GpuCheck("figure", "it is fast", ("-c", ""), 0.5)


def test_every_check_is_stated_once_and_names_files_that_are_there() -> None:
    assert len({check.name for check in CHECKS}) == len({check.statement for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        for argument in check.arguments:
            if argument.startswith("tests/"):
                file, _, test = argument.partition("::")
                assert f"def {test}" in (ROOT / file).read_text()


def test_the_page_lists_every_statement() -> None:
    """As measured, or as not yet measured: never as a fact without a figure."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {check.statement}" for check in CHECKS]
    for row in rows:
        measured, versions = row.split(" | ")[1:3]
        assert measured == NOT_YET or versions


def test_what_is_new_comes_before_what_failed_and_what_is_done_is_left() -> None:
    names = [check.name for check in CHECKS if check.gpus == 1]
    assert [check.name for check in due(CHECKS, {}, 1)] == names
    found = due(CHECKS, {names[0]: BAD, names[1]: GOOD}, 1)
    assert [check.name for check in found] == [*names[2:], names[0]]
    assert "two-gpus" in {check.name for check in due(CHECKS, {}, 2)}


@pytest.mark.parametrize(
    ("check", "code", "output", "expected"),
    [
        (TEST, 0, "...\n===== 3 passed in 2.1s =====\n", ("3 passed in 2.1s", True)),
        (TEST, 0, "3 skipped in 0.1s", ("3 skipped in 0.1s", False)),
        (TEST, 0, "2 passed, 1 skipped in 0.1s", ("2 passed, 1 skipped in 0.1s", False)),
        (TEST, 1, "1 failed in 2s\n", ("failed (1): 1 failed in 2s", False)),
        (TEST, None, "...", ("ran past its limit of 540 s", False)),
        (FIGURE, 0, 'noise\n{"value":0.61,"text":"61%"}', ("61%", True)),
        (FIGURE, 0, '{"value":0.41,"text":"41%"}', ("41%; below the target of 0.5", True)),
        (FIGURE, 0, "noise", ("no figure in 'noise'", False)),
        (FIGURE, 0, "", ("no figure in 'no output'", False)),
    ],
)
def test_judgement(check: GpuCheck, code: int | None, output: str, expected: tuple[str, bool]) -> None:
    assert judge(check, code, output) == expected


def test_a_slice_ends_in_time_and_the_next_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    checks = [GpuCheck(str(index), str(index), ("-c", ""), limit_s=100.0) for index in range(3)]
    ran: list[str] = []

    def execute(check: GpuCheck, seconds: float) -> tuple[int | None, str]:
        ran.append(check.name)
        return 0, "1 passed"

    # One check fits a slice that is as short as its limit: after it there is less left than the next may take.
    for turn in range(3):
        state = State(path)
        is_done = run_slice(due(checks, state.records, 1), state, 100.0, execute, "torch", lambda text: None)
        assert ran == [str(index) for index in range(turn + 1)] and is_done == (turn == 2)
    assert set(State(path).records) == {"0", "1", "2"} and not due(checks, State(path).records, 1)


def test_the_table_takes_its_place_in_the_page() -> None:
    rows = table([TEST, FIGURE], {"test": GOOD})
    assert rows.splitlines()[2:] == [
        "| it works | 3 passed (2026-01-01) | torch | `python -c ''` |",
        f"| it is fast | {NOT_YET} |  | `python -c ''` |",
    ]
    page = f"head\n{BEGIN}\nold\n{END}\ntail\n"
    assert with_table(page, rows) == f"head\n{BEGIN}\n{rows}\n{END}\ntail\n"
    with pytest.raises(ValueError, match="lacks the marks"):
        with_table("nothing", rows)


@pytest.mark.parametrize("arguments", [("decode", "--batch", "2", "--context", "40"), ("prefill", "--context", "64")])
def test_the_figures_programs_run_without_a_gpu(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_figures.main([*arguments, "--device", "cpu", "--shape", "tiny"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=gpu_figures.Measured)
    assert found.value > 0 and "tokens/s" in found.text


def test_our_side_of_the_offline_batch_runs_without_a_gpu() -> None:
    assert gpu_figures.ours_per_s("tiny", "cpu", 3) > 0


def test_the_command_says_what_is_missing() -> None:
    command = [ROOT / "launch" / "gpu-check"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--wheels DIR" in helped.stdout
    absent = subprocess.run([*command, "--wheels", "/nowhere"], capture_output=True, text=True, check=False)
    assert absent.returncode == 2 and "/nowhere: there is no such directory" in absent.stderr


def test_without_a_gpu_the_command_ends_with_the_reason() -> None:
    code = "import torch; raise SystemExit(torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code], check=False).returncode:
        pytest.skip("there is a GPU")
    ran = subprocess.run(
        [sys.executable, "-m", "lepton_dist.bench.gpu_check"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2 and "no GPU is seen" in ran.stderr
