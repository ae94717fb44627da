"""From files to what `plan` plans for, and back to a plan file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from lepton_dist.coordinator.cluster_document import read_cluster
from lepton_dist.coordinator.pricing import Target
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import RequestLengths, Workload
from lepton_dist.coordinator.workload_file import read_workload
from lepton_dist.errors import UsageError
from lepton_dist.model.config import ModelConfig
from lepton_dist.parallel.checkpoint import planned_config
from lepton_dist.plan.document import plan_to_yaml
from lepton_dist.plan.plan import EngineLimits, Plan, Precision
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.planning import InputLengths, read_lengths
from lepton_dist.storage.outputs import write_output
from lepton_dist.text.dialects import is_text_path, open_input


def load_target(
    model: str, cluster: str, workload: str, precision: Precision, limits: EngineLimits, options: Mapping[str, Any]
) -> tuple[Target, list[str]]:
    """What to plan for, and notes for the user. `options`: `max_tokens`, `output_tokens` or None each.

    Raises:
        UsageError: a file is wrong, or the workload holds no request that can be run.
    """
    machines = read_cluster(cluster)
    config = planned_config(model)
    stream = _stream(workload)
    found = InputLengths([stream], []) if stream is not None else load_lengths(model, workload, options, config)
    if not found.requests:
        raise UsageError(
            f"--workload {workload}: holds no request that can be run; {'; '.join(found.notes) or 'it is empty'}"
        )
    dtypes = decide_dtypes(precision, None, config.dtype)
    notes = found.notes + ([dtypes.notice] if dtypes.notice else [])
    wanted = Workload.of(found.requests, is_endless=stream is not None)
    if wanted.longest_tokens > config.max_positions:
        raise UsageError(
            f"--workload {workload}: a request of {wanted.longest_tokens} tokens, but the model's context holds "
            f"{config.max_positions}"
        )
    return Target(machines, ModelCost.of(config, dtypes), config.max_positions, wanted, limits), notes


def _stream(workload: str) -> RequestLengths | None:
    """The request that two numbers describe, of which there is no end; None for a file."""
    lengths = workload.split(",")
    if len(lengths) != 2 or not all(part.strip().isdigit() for part in lengths):
        return None
    prompt, output = (int(part) for part in lengths)
    if prompt < 1 or output < 1:
        raise UsageError(f"--workload {workload}: prompt and output need at least 1 token each")
    return RequestLengths(prompt, output, output)


def load_lengths(model: str, workload: str, options: Mapping[str, Any], config: ModelConfig) -> InputLengths:
    """The requests of a file: lengths, or the input of `generate`. `options` as for `load_target`.

    Raises:
        UsageError: the file or the tokenizer cannot be read.
    """
    if _holds_lengths(workload):
        return InputLengths(read_workload(workload), [])
    given = {name: value for name, value in options.items() if name == "max_tokens" and value is not None}
    return read_lengths(
        workload,
        model,
        given,
        vocab=config.shape.vocab,
        context_tokens=config.max_positions,
        output_tokens=options["output_tokens"],
    )


def _holds_lengths(path: str) -> bool:
    """Whether a file is a workload of `simulate`: lengths instead of prompts."""
    if is_text_path(path):
        return False
    with open_input(path) as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        values = msgspec.json.decode(first)
    except msgspec.DecodeError:
        return False
    return isinstance(values, dict) and "prompt_tokens" in values


def write_plan(path: str, plan: Plan) -> None:
    """Write a plan file; the cluster file that it names, as seen from here, is named as seen from there.

    Raises:
        OutputError: it cannot be written.
    """
    if plan.cluster is not None and not Path(plan.cluster).is_absolute():
        plan = replace(plan, cluster=os.path.relpath(plan.cluster, Path(path).parent))
    write_output(path, "# Written by lepton-dist plan.\n" + plan_to_yaml(plan))
