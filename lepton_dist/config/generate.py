"""The settings of `generate`: from a run file, overridden by options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lepton_dist.config.sampling import SAMPLING_FIELDS, checked_fields
from lepton_dist.documents import Document, read_yaml
from lepton_dist.errors import ConfigError, RequestError, UsageError
from lepton_dist.values import FLOATS, checked_dtype, checked_seconds, checked_threads


@dataclass(frozen=True)
class GenerateConfig:
    """One batch run. `plan`, `decision_log` and `run_file` are paths; `sampling` holds the fields that the user gave;
    times are seconds. `decision_log` has no option: it is for those who look into the balancer. `run_file` is where the
    settings were read.
    """

    model: str
    input: str
    output: str
    plan: str | None = None
    dtype: str | None = None
    threads: int = 0
    seed: int = 0
    grace_s: float = 20.0
    overwrite: bool = False
    retry_errors: bool = False
    show: bool = False
    decision_log: str | None = None
    run_file: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)


_TYPES: Mapping[str, type] = {
    "model": str,
    "input": str,
    "output": str,
    "plan": str,
    "dtype": str,
    "threads": int,
    "seed": int,
    "grace_s": float,
    "overwrite": bool,
    "retry_errors": bool,
    "show": bool,
    "decision_log": str,
}
_PATHS = ("model", "input", "output", "plan", "decision_log")


def load_generate_config(run_file: str | None, options: Mapping[str, Any]) -> GenerateConfig:
    """Settings from a run file (or none) with `options` over them; None among the options means "not given".

    Paths in a run file are relative to it. Sampling fields stand under ``sampling`` in the file.

    Raises:
        ConfigError: the file has an unknown key or a value of the wrong type.
        UsageError: the model, the input or the output is not given anywhere.
    """
    values: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    if run_file is not None:
        values, sampling = _read(read_yaml(run_file), Path(run_file).parent)
    given = {name: value for name, value in options.items() if value is not None}
    sampling |= {name: value for name, value in given.items() if name in SAMPLING_FIELDS and name != "seed"}
    values |= {name: value for name, value in given.items() if name in _TYPES}
    for name in ("model", "input", "output"):
        if name not in values:
            raise UsageError(f"--{name} is missing: give it as an option or in the file of --config")
    try:
        checked = {name: _checked(name, value) for name, value in values.items()}
        return GenerateConfig(**checked, run_file=run_file, sampling=checked_fields(sampling))
    except (RequestError, ValueError) as error:
        raise UsageError(f"option {error}") from None


def _checked(name: str, value: Any) -> Any:
    """A setting's value, in its own type.

    Raises:
        ValueError: it is of another type or out of range.
        RequestError: the same, of the seed.
    """
    if name == "dtype":
        return checked_dtype(value)
    if name == "threads":
        return checked_threads(value)
    if name == "seed":
        return checked_fields({name: value})[name]
    if name == "grace_s":
        return checked_seconds("grace_s (--grace)", value, is_zero_allowed=True)
    if _TYPES[name] is bool and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    if _TYPES[name] is str and (not isinstance(value, str) or not value or "\0" in value):
        raise ValueError(f"{name} is {value!r}; it must be a path")
    return value


def _read(document: Document, base: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not isinstance(document.values, dict):
        raise document.error("", "must be a mapping of settings")
    known = [*_TYPES, "sampling"]
    values = {name: value for name, value in document.values.items() if value is not None}  # null: not given
    sampling = values.pop("sampling", {})
    if not isinstance(sampling, dict):
        raise document.error("sampling", "must be a mapping of sampling fields")
    for name, value in values.items():
        if name not in _TYPES:
            raise document.error(name, f"is no setting of generate; known: {', '.join(known)}")
        try:
            values[name] = _checked(name, value)
        except (RequestError, ValueError) as error:
            raise document.error(name, str(error)) from None
        if name in _PATHS:
            values[name] = str(base / value)
    if sampling.get("seed") is not None:
        raise document.error("sampling.seed", "would give every row the same seed: write `seed:` beside `sampling:`")
    try:
        checked_fields(sampling)
    except RequestError as error:
        key = next((f"sampling.{name}" for name in sampling if str(error).find(name) >= 0), "sampling")
        raise ConfigError(str(error), key=key, place=document.place(key)) from None
    return values, sampling


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`. None of them has a default here, so that a run file shows through."""
    run = parser.add_argument_group("the run")
    run.add_argument("--config", metavar="FILE", help="a run file (YAML) with any of these settings")
    run.add_argument("--model", metavar="DIR", help="a Hugging Face checkpoint directory (safetensors)")
    run.add_argument(
        "--input", metavar="FILE", help="prompts: JSON Lines, OpenAI batch rows, or .txt with a prompt a line"
    )
    run.add_argument("--output", metavar="FILE", help="results, a JSON line each; the same command again resumes")
    run.add_argument(
        "--plan", metavar="FILE", help="the sharding plan (YAML); default: tp over a node's ranks, pp over nodes"
    )
    run.add_argument(
        "--dtype",
        choices=FLOATS,
        help="weights, KV cache and wire; default: the checkpoint's",
    )
    run.add_argument(
        "--threads", type=int, metavar="N", help="threads a rank; default: SLURM's, OpenMP's, or a fair share"
    )
    run.add_argument(
        "--grace", dest="grace_s", type=float, metavar="S", help="seconds to finish in after a signal (20)"
    )
    run.add_argument("--overwrite", action="store_true", default=None, help="forget what the output holds")
    run.add_argument("--retry-errors", action="store_true", default=None, help="run error rows again")
    run.add_argument("--show", action="store_true", default=None, help="print each text on stdout as it is done")
    sampling = parser.add_argument_group("sampling defaults; a row's own fields go before them")
    sampling.add_argument("--seed", type=int, metavar="N", help="base of the seeds of rows without one (0)")
    for name, kind in (
        ("max-tokens", int),
        ("temperature", float),
        ("top-k", int),
        ("top-p", float),
        ("min-p", float),
        ("repetition-penalty", float),
        ("presence-penalty", float),
        ("frequency-penalty", float),
        ("n", int),
        ("logprobs", int),
        ("prompt-logprobs", int),
    ):
        sampling.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="may be given several times")
    sampling.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID")
    sampling.add_argument("--ignore-eos", action="store_true", default=None)
    sampling.add_argument("--return-token-ids", action="store_true", default=None)
