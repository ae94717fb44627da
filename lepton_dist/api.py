"""The Python API: generate texts from a script, on one rank or under mpirun."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.request import Request
from lepton_dist.errors import RequestError, UsageError
from lepton_dist.plan.document import load_plan
from lepton_dist.plan.plan import Plan, Precision, Replica, Stage
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.job import Job, script_job
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.requests import RequestMaker, checkpoint_sampling
from lepton_dist.text.completion import RequestOutput
from lepton_dist.text.dataset import Dataset, load_dataset
from lepton_dist.text.output import OutputFormatter
from lepton_dist.text.rows import PromptRow
from lepton_dist.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Settings:
    """What a session depends on; another value means another session."""

    model: str
    plan: Plan | None
    dtype: str | None
    threads: int
    max_sequences: int
    is_dynamic: bool
    is_quantized: bool

    def precision(self, planned: Precision) -> Precision:
        """The plan's precision, or int8 weights in its place, with `dtype` for what is not weights."""
        if not self.is_quantized:
            return planned
        return replace(
            planned, weights="int8", kv_cache=self.dtype or planned.kv_cache, wire=self.dtype or planned.wire
        )


class LeptonInference:
    """A model spread over the ranks of the job.

    Run as a plain script it has one rank; under ``mpirun`` or ``srun`` the first object turns the ranks other than 0
    into workers, which never return to the script. The model is loaded when texts are first asked for.

    Args:
        model_path: a Hugging Face checkpoint directory; or call `load_model` later.
        quantization: whether weights are rounded to int8 while they are loaded, whatever the plan says.
        plan: a `Plan` or a plan file; by default tensor parallel over a node's ranks and pipelines over nodes.
        dtype: "float32" or "bfloat16", over the plan's; by default the checkpoint's.
        threads: threads a rank; 0 for the job's setting or a fair share of the cores.

    Raises:
        LaunchError: the launcher and the MPI library do not belong together.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        *,
        quantization: bool = False,
        plan: Plan | str | os.PathLike[str] | None = None,
        dtype: str | None = None,
        threads: int = 0,
    ) -> None:
        chosen = plan if plan is None or isinstance(plan, Plan) else load_plan(plan)
        self._job: Job = script_job()
        limits = chosen.engine if chosen is not None else Plan().engine
        self._settings = _Settings("", chosen, dtype, threads, limits.max_sequences, True, quantization)
        self._blueprint: Blueprint | None = None
        self._opened: _Settings | None = None
        if model_path is not None:
            self.load_model(model_path)

    def load_model(self, model_path: str | os.PathLike[str]) -> None:
        """Use this checkpoint from now on.

        Raises:
            UsageError: it is no directory.
        """
        if not Path(model_path).is_dir():
            raise UsageError(f"{model_path}: is not a directory: a checkpoint directory with config.json is needed")
        self._settings = replace(self._settings, model=str(Path(model_path).absolute()))

    def set_batch_size(self, batch_size: int) -> None:
        """The most sequences that a replica works on at once; the texts do not depend on it.

        Raises:
            UsageError: it is less than 1.
        """
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}")
        self._settings = replace(self._settings, max_sequences=batch_size)

    def set_dynamic_scheduling(self, is_dynamic: bool) -> None:
        """Whether requests go to the replica with the least predicted load, or to the replicas in turn."""
        self._settings = replace(self._settings, is_dynamic=is_dynamic)

    def generate_texts(
        self,
        dataset: Dataset | Sequence[str],
        *,
        epochs: int = 1,
        quantization: bool | None = None,
        pruning: bool | None = None,
        dynamic_scheduling: bool | None = None,
        parallel: bool = True,
        sampling: SamplingParams | None = None,
    ) -> list[str]:
        """Complete every prompt; pass after pass, each in input order.

        Args:
            dataset: from `load_dataset`, or prompts.
            epochs: the number of passes; each draws its own samples.
            quantization: as in the constructor, for this call; None keeps what is set.
            pruning: must be None or False in this version.
            dynamic_scheduling: as `set_dynamic_scheduling`, for this call; None keeps what is set.
            parallel: False uses rank 0 only.
            sampling: how tokens are chosen; a row's own fields go before it. By default the checkpoint's defaults.

        Raises:
            UsageError: a setting is not supported, or no model is loaded.
            RequestError: a row cannot be run, or the model has no numbers for it; the message names its line.
            CheckpointError: the model is wrong, or has no numbers for any prompt.
        """
        _refuse(pruning, "pruning")
        if epochs < 1:
            raise UsageError(f"epochs must be at least 1, not {epochs}")
        settings = self._settings
        if dynamic_scheduling is not None:
            settings = replace(settings, is_dynamic=dynamic_scheduling)
        if quantization is not None:
            settings = replace(settings, is_quantized=quantization)
        if not parallel:
            settings = replace(settings, plan=_alone(settings.plan))
        rows = dataset if isinstance(dataset, Dataset) else load_dataset(dataset)
        controller, blueprint = self._open(settings)
        tokenizer = Tokenizer.load(settings.model)
        formatter = OutputFormatter(tokenizer, model=Path(settings.model).name)
        requests: list[Request] = []
        for epoch in range(epochs):
            maker = _maker(blueprint, tokenizer, settings.model, sampling, epoch)
            requests += [_request(maker, controller, row, epoch) for row in rows]
        outputs = _run(controller, requests)
        for row, request in zip(cycle(rows), requests, strict=False):
            if failure := outputs[request.key].failure:
                raise RequestError(f"row {row.id!r} (line {row.line}): {failure}", kind="server_error")
        return [formatter.texts(outputs[request.key])[0] for request in requests]

    def _open(self, settings: _Settings) -> tuple[Controller, Blueprint]:
        """The session of these settings: the one that is open, or a new one."""
        job = self._job
        if not settings.model:
            raise UsageError("no model is loaded: give model_path, or call load_model")
        if self._blueprint is not None and job.owner is self and self._opened == settings:
            return job.controller, self._blueprint
        if job.controller.is_open:
            job.controller.close()
        plan = (settings.plan or Plan()).laid_out(job.controller.world.nodes)
        plan = replace(
            plan,
            engine=replace(plan.engine, max_sequences=settings.max_sequences),
            precision=settings.precision(plan.precision),
        )
        dtype = None if settings.is_quantized else settings.dtype
        request = ModelRequest(settings.model, plan, dtype, settings.threads)
        self._blueprint = open_model(job.controller, request, is_dynamic=settings.is_dynamic)
        self._opened, job.owner = settings, self
        return job.controller, self._blueprint


def _refuse(value: bool | None, name: str) -> None:
    if value:
        raise UsageError(f"{name} is not supported by this version: leave it out")


def _alone(plan: Plan | None) -> Plan:
    """The same plan's settings on rank 0 alone."""
    return replace(plan or Plan(), mesh=None, replicas=(Replica((Stage((0,)),)),))


def _maker(
    blueprint: Blueprint, tokenizer: Tokenizer, model: str, sampling: SamplingParams | None, epoch: int
) -> RequestMaker:
    options: dict[str, Any] = msgspec.structs.asdict(sampling) if sampling is not None else {}
    base_seed = options.pop("seed", None) or 0
    return RequestMaker(
        tokenizer,
        options,
        checkpoint_sampling(model),
        vocab=blueprint.config.shape.vocab,
        context_tokens=blueprint.context_tokens,
        base_seed=base_seed + epoch,
    )


def _request(maker: RequestMaker, controller: Controller, row: PromptRow, epoch: int) -> Request:
    try:
        request = maker.request(row)
        controller.check(request)
    except RequestError as error:
        raise RequestError(f"row {row.id!r} (line {row.line}): {error}", kind=error.kind) from None
    if request.sampling.n != 1:
        raise RequestError(f"row {row.id!r} (line {row.line}): n is {request.sampling.n}; texts are one a prompt here")
    return msgspec.structs.replace(request, key=f"{epoch}/{request.key}")


def _run(controller: Controller, requests: list[Request]) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    for request in requests:
        controller.submit(request)
    while controller.num_outstanding:
        outputs.update(controller.advance())
    return outputs
