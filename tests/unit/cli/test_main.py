"""`lepton-dist` with little behind it: what a user types first."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from lepton_dist.cli.main import COMMANDS


def told(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lepton_dist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("help",), 0), (("--help",), 0)])
def test_the_commands_are_listed(arguments: tuple[str, ...], code: int) -> None:
    done = told(*arguments)
    assert done.returncode == code and all(f"  {name} " in done.stdout for name in COMMANDS), done


def test_the_version_is_that_of_the_package() -> None:
    assert told("--version").stdout == f"lepton-dist {version('lepton-dist')}\n"


def test_a_command_that_is_none_and_one_that_needs_help() -> None:
    done = told("generat")
    assert done.returncode == 2 and "there is no command 'generat'; known: generate, inspect" in done.stderr, done
    assert "--max-tokens" in told("help", "generate").stdout
