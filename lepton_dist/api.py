"""The Python API: generate texts from a script, on one rank or under mpirun."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
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
from lepton_dist.runtime.job import Call, Job, script_job
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.requests import RequestMaker, checkpoint_sampling
from lepton_dist.text.dataset import Dataset, load_dataset
from lepton_dist.text.output import OutputFormatter
from lepton_dist.text.rows import PromptRow
from lepton_dist.text.tokenizer import Tokenizer
from lepton_dist.values import checked_dtype, checked_threads, checked_whole

_MOST_SEQUENCES = 2**20
_MOST_EPOCHS = 10**6


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
        UsageError: an argument is of a wrong type or value.
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
        try:
            dtype = None if dtype is None else checked_dtype(dtype)
            threads = checked_threads(threads)
        except ValueError as error:
            raise UsageError(str(error)) from None
        chosen = plan if plan is None or isinstance(plan, Plan) else load_plan(_path("plan", plan))
        limits = chosen.engine if chosen is not None else Plan().engine
        quantized = _flag("quantization", quantization)
        self._settings = _Settings("", chosen, dtype, threads, limits.max_sequences, True, quantized)
        self._job: Job = script_job()
        self._blueprint: Blueprint | None = None
        self._opened: _Settings | None = None
        if model_path is not None:
            self.load_model(model_path)

    def load_model(self, model_path: str | os.PathLike[str]) -> None:
        """Use this checkpoint from now on.

        Raises:
            UsageError: it is no directory.
        """
        if not Path(_path("model_path", model_path)).is_dir():
            raise UsageError(f"{model_path}: is not a directory: a checkpoint directory with config.json is needed")
        self._settings = replace(self._settings, model=str(Path(model_path).absolute()))

    def set_batch_size(self, batch_size: int) -> None:
        """The most sequences that a replica works on at once; the texts do not depend on it.

        Raises:
            UsageError: it is no whole number of at least 1.
        """
        try:
            checked_whole("batch_size", batch_size, 1, _MOST_SEQUENCES)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self._settings = replace(self._settings, max_sequences=batch_size)

    def set_dynamic_scheduling(self, is_dynamic: bool) -> None:
        """Whether requests go to the replica with the least predicted load, or to the replicas in turn."""
        self._settings = replace(self._settings, is_dynamic=_flag("is_dynamic", is_dynamic))

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

        However a call ends, by an error or by Ctrl-C, the next one works: what was under way is given up.

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
        settings = self._settings
        try:
            checked_whole("epochs", epochs, 1, _MOST_EPOCHS)
            params = _checked_sampling(sampling)
        except (ValueError, RequestError) as error:
            raise UsageError(str(error)) from None
        if dynamic_scheduling is not None:
            settings = replace(settings, is_dynamic=_flag("dynamic_scheduling", dynamic_scheduling))
        if quantization is not None:
            settings = replace(settings, is_quantized=_flag("quantization", quantization))
        if not _flag("parallel", parallel):
            settings = replace(settings, plan=_alone(settings.plan))
        rows = dataset if isinstance(dataset, Dataset) else load_dataset(_prompts(dataset))
        with self._job.call() as call:
            blueprint = self._open(settings)
            call.interrupts.answer()
            tokenizer = Tokenizer.load(settings.model)
            formatter = OutputFormatter(tokenizer, model=Path(settings.model).name)
            requests: list[Request] = []
            for epoch in range(epochs):
                maker = _maker(blueprint, tokenizer, settings.model, params, epoch)
                requests += [_request(maker, call, row, epoch) for row in rows]
            outputs = call.run(requests)
            for row, request in zip(cycle(rows), requests, strict=False):
                if failure := outputs[request.key].failure:
                    raise RequestError(f"row {row.id!r} (line {row.line}): {failure}", kind="server_error")
            return [formatter.texts(outputs[request.key])[0] for request in requests]

    def _open(self, settings: _Settings) -> Blueprint:
        """The session of these settings: the one that is open, or a new one."""
        job = self._job
        if not settings.model:
            raise UsageError("no model is loaded: give model_path, or call load_model")
        if self._blueprint is not None and job.owner is self and self._opened == settings:
            return self._blueprint
        # Before anything can fail: from here on no session is this object's.
        self._blueprint = self._opened = job.owner = None
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
        blueprint = open_model(job.controller, request, is_dynamic=settings.is_dynamic)
        self._blueprint, self._opened, job.owner = blueprint, settings, self
        return blueprint


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


def _request(maker: RequestMaker, call: Call, row: PromptRow, epoch: int) -> Request:
    call.interrupts.answer()
    try:
        request = maker.request(row)
        call.controller.check(request)
    except RequestError as error:
        raise RequestError(f"row {row.id!r} (line {row.line}): {error}", kind=error.kind) from None
    if request.sampling.n != 1:
        raise RequestError(f"row {row.id!r} (line {row.line}): n is {request.sampling.n}; texts are one a prompt here")
    return msgspec.structs.replace(request, key=f"{call.prefix}{epoch}/{request.key}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; it must be True or False")
    return value


def _path(name: str, value: Any) -> str | os.PathLike[str]:
    if not isinstance(value, str | os.PathLike):
        raise UsageError(f"{name} is {value!r}; it must be a path")
    return value


def _prompts(dataset: Any) -> Sequence[str]:
    """The prompts of a list; a text is none, but its letters are texts."""
    if isinstance(dataset, str | bytes | os.PathLike) or not isinstance(dataset, Iterable):
        raise UsageError(
            f"dataset is {type(dataset).__name__}: give a list of prompts ([prompt]), or what load_dataset returns"
        )
    return list(dataset)


def _checked_sampling(sampling: Any) -> SamplingParams | None:
    """Sampling parameters whose values are allowed.

    Raises:
        UsageError: these are none.
        RequestError: a value is out of range.
    """
    if sampling is None:
        return None
    if not isinstance(sampling, SamplingParams):
        raise UsageError(f"sampling is {type(sampling).__name__}; it must be a SamplingParams")
    return sampling.validated()
