"""Modules that run when they are used, and torch without those that only its compiler wants."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from lepton_dist.cli.deferral import Deferral

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module that can be imported, is deferred until `deferred_user` comes, and leaves no trace."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [Deferral({"deferred_one": "deferred_user"}), *sys.meta_path])

    def write_module(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield write_module
    for name in ("deferred_one", "deferred_user"):
        sys.modules.pop(name, None)


def test_a_module_runs_when_something_in_it_is_asked_for(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module(write("deferred_one", "print('runs')\nanswer = 42\n"))
    assert import_module("deferred_one") is module  # a second import is no use of it
    assert module.__name__ == "deferred_one" and not hasattr(module, "__path__")
    assert capsys.readouterr().out == ""
    assert module.answer == 42 and module.answer == 42
    assert capsys.readouterr().out == "runs\n"
    with pytest.raises(AttributeError, match=r"deferred_one.*question"):
        _ = module.question


def test_a_module_runs_when_its_user_is_imported(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    import_module(write("deferred_one", "print('runs')\n"))
    import_module(write("deferred_user", "print('the user too')\n"))
    assert capsys.readouterr().out == "runs\nthe user too\n"


def test_a_fault_in_it_is_told_where_it_is_used(write: Write) -> None:
    module = import_module(write("deferred_one", "1 / 0\n"))
    with pytest.raises(ZeroDivisionError):
        _ = module.answer


def test_torch_computes_without_what_its_compiler_wants_and_finds_it_then() -> None:
    code = """
from lepton_dist.cli.deferral import leave_out_compiler
leave_out_compiler()
import sys, torch
print("torch._decomp" in sys.modules, float(torch.ones(3, requires_grad=True).softmax(0).sum()))
import torch._dynamo
print("torch._decomp" in sys.modules, torch.linalg.eigh(torch.ones(2, 2, device="meta"))[0].shape)
torch.Generator()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["False 1.0", "True torch.Size([2])"], done.stdout + done.stderr
