"""The command itself: quick help, usage errors, and a process that no launcher started."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lepton_dist.cli.main import COMMANDS
from tests.end_to_end.rig import MODEL, generate, read_rows, write_rows
from tests.harness import run

CLI = ("-m", "lepton_dist.cli.main")


def test_help_is_quick_and_lists_the_commands() -> None:
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy with other things
        start_s = time.monotonic()
        job = run([*CLI, "--help"])
        seconds.append(time.monotonic() - start_s)
        assert job.returncode == 0 and "generate" in job.stdout and "doctor" in job.stdout, job.report()
    assert min(seconds) < 0.5, seconds


def test_help_imports_neither_torch_nor_mpi() -> None:
    code = "import sys\nfrom lepton_dist.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
    job = run(["-c", code + "    print(sorted({'torch', 'numpy', 'mpi4py', 'yaml'} & set(sys.modules)))"])
    assert job.stdout.splitlines()[-1] == "[]", job.report()


@pytest.mark.parametrize("words", [[], ["--no-such-option"]], ids=["help", "wrong"])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_computes_is_imported_after_the_options_are_read(name: str, words: list[str]) -> None:
    words = [name, *(words or ["--help"])]
    code = f"import sys\nfrom lepton_dist.cli.main import main\ntry:\n    main({words!r})\nexcept SystemExit as end:\n"
    job = run(["-c", code + "    print(end.code, sorted({'torch', 'mpi4py'} & set(sys.modules)))"])
    assert job.stdout.splitlines()[-1] == f"{2 if '--no-such-option' in words else 0} []", job.report()


def test_a_run_loads_no_compiler(tmp_path: Path) -> None:
    # torch's takes as long to import as torch itself, and comes with many of its smallest parts.
    source = write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "import os\n"}])
    words = generate(MODEL, source, tmp_path / "out.jsonl", "--max-tokens", "3")[len(CLI) :]
    code = f"import sys\nfrom lepton_dist.cli.main import main\ncode = main({words!r})\n"
    job = run(["-c", code + "print(code, sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)))"])
    assert job.stdout.splitlines()[-1] == "0 []", job.report()


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_usage_error_is_said_once(ranks: int | None) -> None:
    job = run([*CLI, "generat"], ranks=ranks)
    assert job.returncode == 2 and job.left == (), job.report()
    assert job.stderr.count("there is no command 'generat'; known: generate") == 1, job.report()


def test_alone_without_a_launcher_mpi_is_not_loaded(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "import os\n"}])
    words = generate(MODEL, source, tmp_path / "out.jsonl", "--max-tokens", "3", "--show")
    # The library that does not exist would be an error as soon as MPI were loaded.
    job = run(words, env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert job.returncode == 0 and job.stdout.startswith("--- a\nimport os\n"), job.report()
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert row["id"] == "a" and row["finish_reason"] == "length"
    assert row["usage"]["completion_tokens"] == 3
