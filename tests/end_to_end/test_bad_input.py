"""Every wrong command and file ends with exit code 2 and one clear message, on one rank and on several."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.rig import MODEL, arguments, copy_model, edit_header, edit_json, write_rows
from tests.harness import run

TEXT = [{"id": 1, "prompt": "def f"}]


@dataclass
class Case:
    """One wrong thing: `break_it` spoils a folder and gives the options that differ from a right command's."""

    name: str
    words: Sequence[str]
    break_it: Callable[[Path], Sequence[str | Path]]
    code: int = 2


def model_case(name: str, words: Sequence[str], spoil: Callable[[Path], object]) -> Case:
    """A case with a spoilt copy of the example model."""

    def break_it(folder: Path) -> Sequence[str | Path]:
        model = copy_model(folder / "model")
        spoil(model)
        return ["--model", model]

    return Case(name, words, break_it)


def file_case(name: str, words: Sequence[str], option: str, text: str) -> Case:
    """A case with a spoilt file that an option names."""

    def break_it(folder: Path) -> Sequence[str | Path]:
        path = folder / "spoilt.yaml"
        path.write_text(text)
        return [option, path]

    return Case(name, words, break_it)


def option_case(name: str, words: Sequence[str], *options: str | Path) -> Case:
    """A case of wrong options."""
    return Case(name, words, lambda folder: [str(option).format(folder=folder) for option in options])


def cut(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:size])


def drop_tensor(path: Path, name: str) -> None:
    edit_header(path, lambda header: header.update(another=header.pop(name)))


def store_as_integers(path: Path, name: str) -> None:
    edit_header(path, lambda header: header[name].update(dtype="I16"))


def flatten(path: Path, name: str) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header[name]["shape"] = [256 * 704]

    edit_header(path, change)


def shard(model: Path) -> None:
    """A checkpoint of two files by its index, of which one is absent."""
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


UP = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"
CASES = [
    option_case(
        "no such model", ["{folder}/absent", "is not a directory", "config.json"], "--model", "{folder}/absent"
    ),
    model_case("no weights", ["holds no *.safetensors"], lambda model: (model / WEIGHTS).unlink()),
    model_case("weights cut in the data", [WEIGHTS, "truncated", "9000000"], lambda m: cut(m / WEIGHTS, 9_000_000)),
    model_case("weights cut in the header", [WEIGHTS, "truncated", "500 bytes"], lambda m: cut(m / WEIGHTS, 500)),
    model_case("empty weights", [WEIGHTS, "truncated", "0 bytes"], lambda m: cut(m / WEIGHTS, 0)),
    model_case("weights that are none", [WEIGHTS, "no safetensors file"], lambda m: edit_bytes(m / WEIGHTS)),
    model_case("a weight file missing", ["1 of 2 weight files", "model-00002-of-00002.safetensors"], shard),
    model_case("a tensor missing", [UP], lambda m: drop_tensor(m / WEIGHTS, UP)),
    model_case("a tensor of integers", [UP, "int16"], lambda m: store_as_integers(m / WEIGHTS, UP)),
    model_case("a tensor of another shape", [UP, "704, 256", "180224"], lambda m: flatten(m / WEIGHTS, UP)),
    model_case(
        "a config of another size",
        ["model.safetensors", "gate_proj", "704", "640"],
        lambda m: edit_json(m / "config.json", intermediate_size=640),
    ),
    model_case("no config", ["config.json", "No such file"], lambda m: (m / "config.json").unlink()),
    model_case("a config cut short", ["config.json", "not valid JSON"], lambda m: cut(m / "config.json", 100)),
    model_case(
        "a config with binary in it",
        ["config.json", "UTF-8", "byte 1"],
        lambda m: (m / "config.json").write_bytes(b"{\xff}"),
    ),
    model_case(
        "an unknown architecture",
        ["config.json: model_type", "'mamba'", "known: ", "llama"],
        lambda m: edit_json(m / "config.json", model_type="mamba"),
    ),
    model_case(
        "a config without layers",
        ["config.json: num_hidden_layers", "is missing"],
        lambda m: edit_json(m / "config.json", num_hidden_layers=None),
    ),
    model_case(
        "a config with a word for a number",
        ["config.json: hidden_size", "'many'"],
        lambda m: edit_json(m / "config.json", hidden_size="many"),
    ),
    model_case("a tokenizer cut short", ["tokenizer.json"], lambda m: cut(m / "tokenizer.json", 1000)),
    model_case("no tokenizer for text", ["line 1", "tokenizer.json"], lambda m: (m / "tokenizer.json").unlink()),
    model_case(
        "a wrong generation config",
        ["generation_config.json", "temperature", "-1"],
        lambda m: edit_json(m / "generation_config.json", temperature=-1),
    ),
    file_case(
        "a plan for another world",
        ["spoilt.yaml:1: mesh", "= 6 ranks", "the job has"],
        "--plan",
        "mesh: {pp: 3, tp: 2}\n",
    ),
    file_case("a plan that is no YAML", ["spoilt.yaml:2", "not valid YAML"], "--plan", "mesh: {pp: 1\ntp: [\n"),
    file_case(
        "a plan with an unknown key", ["spoilt.yaml:2: engine.blocks"], "--plan", "mesh: {}\nengine: {blocks: 1}\n"
    ),
    file_case(
        "a plan with too many layers",
        ["spoilt.yaml:1", "layers", "7", "6"],
        "--plan",
        "replicas: [{stages: [{ranks: [0], layers: 7}]}]\n",
    ),
    file_case(
        "a cache too small for a block",
        ["spoilt.yaml:2: engine.kv_cache_bytes", "1000 bytes do not hold one block"],
        "--plan",
        "mesh: {tp: RANKS}\nengine: {kv_cache_bytes: 1000}\n",
    ),
    file_case(
        "a cache beyond the memory",
        ["spoilt.yaml:2: engine.kv_cache_bytes", "rank 0 on", "for the KV cache, but may use"],
        "--plan",
        "mesh: {tp: RANKS}\nengine: {kv_cache_bytes: 900TB, max_sequences: 100000000}\n",
    ),
    option_case("no such plan", ["{folder}/absent.yaml", "cannot be read"], "--plan", "{folder}/absent.yaml"),
    option_case(
        "no such input", ["{folder}/absent.jsonl", "the input cannot be read"], "--input", "{folder}/absent.jsonl"
    ),
    option_case("a folder for an input", ["{folder}", "the input cannot be read"], "--input", "{folder}"),
    option_case("a folder for an output", ["{folder}", "the output is a directory"], "--output", "{folder}"),
    option_case("no folder for the output", ["{folder}/no", "does not exist"], "--output", "{folder}/no/out.jsonl"),
    option_case("an output that cannot be", ["/proc", "cannot be written"], "--output", "/proc/self/out.jsonl"),
    option_case("an output without a job file", ["prompts", "--overwrite"], "--output", "{folder}/prompts"),
    option_case("an output that is the input", ["in.jsonl", "overwrite the input"], "--output", "{folder}/in.jsonl"),
    Case("an output that is the input by a link", ["overwrite the input"], lambda folder: linked(folder, "in.jsonl")),
    Case("an output that is the plan", ["overwrite the plan"], lambda f: planned(f)),
    Case("an output that is a file of the model", ["a file of the model", "config.json"], lambda f: modelled(f)),
    Case("an input that is a pipe", ["the input cannot be read", "it is a pipe"], lambda f: piped(f, "--input")),
    Case("a plan that is a pipe", ["spoilt", "it is a pipe"], lambda f: piped(f, "--plan")),
    Case("a run file that is a pipe", ["spoilt", "it is a pipe"], lambda f: piped(f, "--config")),
    option_case("an unknown option", ["unrecognized arguments: --fast"], "--fast"),
    option_case("a value out of range", ["max_tokens", "0"], "--max-tokens", "0"),
    option_case("an unknown dtype", ["--dtype", "int3", "bfloat16"], "--dtype", "int3"),
    option_case("a negative grace", ["grace", "-1"], "--grace", "-1"),
    file_case("a run file with an unknown key", ["spoilt.yaml:2: modle", "known: "], "--config", "seed: 1\nmodle: x\n"),
    file_case("a run file with a wrong type", ["spoilt.yaml:1: seed", "a string"], "--config", "seed: one\n"),
    file_case(
        "rounded weights as a dtype", ["spoilt.yaml:1: dtype", "written in the plan"], "--config", "dtype: int8\n"
    ),
    file_case("a dtype that is none", ["spoilt.yaml:1: dtype", "'float8'"], "--config", "dtype: float8\n"),
    file_case("threads below none", ["spoilt.yaml:1: threads", "-1"], "--config", "threads: -1\n"),
    file_case("threads beyond reason", ["spoilt.yaml:1: threads", "100000"], "--config", "threads: 100000\n"),
    file_case("a seed for all rows", ["spoilt.yaml:1: sampling.seed"], "--config", "sampling: {seed: 3}\n"),
    file_case("a seed of many digits", ["spoilt.yaml:1: seed", "digits"], "--config", f"seed: {10**40}\n"),
    file_case("an endless deadline", ["step_timeout_s", "inf"], "--plan", "engine: {step_timeout_s: .inf}\n"),
    file_case("blocks beyond reason", ["engine.block_tokens"], "--plan", f"engine: {{block_tokens: {10**12}}}\n"),
    option_case("threads that are none", ["threads is -1"], "--threads", "-1"),
]


def linked(folder: Path, name: str) -> Sequence[str | Path]:
    (folder / "link").symlink_to(name)
    return ["--output", folder / "link", "--overwrite"]


def planned(folder: Path) -> Sequence[str | Path]:
    path = folder / "plan.yaml"
    path.write_text("engine: {max_sequences: 2}\n")
    return ["--plan", path, "--output", path, "--overwrite"]


def modelled(folder: Path) -> Sequence[str | Path]:
    model = copy_model(folder / "model")
    return ["--model", model, "--output", model / "config.json", "--overwrite"]


def piped(folder: Path, option: str) -> Sequence[str | Path]:
    os.mkfifo(folder / "spoilt")
    return [option, folder / "spoilt"]


def edit_bytes(path: Path) -> None:
    path.write_bytes((40).to_bytes(8, "little") + b"x" * 100)


def command(case: Case, folder: Path, ranks: int) -> list[str]:
    """The command of a case, with everything it needs in `folder`."""
    folder.mkdir()
    source = write_rows(folder / "in.jsonl", TEXT)
    (folder / "prompts").write_bytes(source.read_bytes())
    changes = [str(word) for word in case.break_it(folder)]
    spoilt = folder / "spoilt.yaml"
    if spoilt.exists():
        spoilt.write_text(spoilt.read_text().replace("RANKS", str(ranks)))
    # The last of two equal options counts.
    return ["generate", *arguments(MODEL, source, folder / "out.jsonl", "--max-tokens", "2"), *changes]


def check(case: Case, folder: Path, codes: Sequence[int], printed: Sequence[str]) -> None:
    text = "".join(printed)
    assert set(codes) == {case.code}, (codes, text)
    assert "Traceback" not in text, text
    assert text.count("error: ") == 1, text
    message = text[text.index("error: ") :]
    for word in case.words:
        assert word.format(folder=folder) in message, (word, text)
    assert not any(printed[1:]), printed


@pytest.mark.parametrize("ranks", [None, 2])
def test_it_is_refused(ranks: int | None, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(CASES))]
    commands = [command(case, folder, ranks or 1) for case, folder in zip(CASES, folders, strict=True)]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    job = run([Path(__file__).with_name("session.py"), tmp_path / "commands.json"], ranks=ranks, seconds=120)
    ends = [json.loads(line) for line in job.stdout.splitlines()]
    assert len(ends) == len(CASES), f"the job did not survive {CASES[len(ends)].name!r}: {job.report()}"
    assert job.returncode == 0 and job.left == (), job.report()
    failures = []
    for case, folder, end in zip(CASES, folders, ends, strict=True):
        try:
            check(case, folder, end["codes"], end["printed"])
        except AssertionError as error:
            failures.append(f"{case.name}: {error}")
    assert not failures, "\n".join(failures)
