"""`doctor` on a checkpoint and a plan: complete, seen by every node, and small enough for the memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lepton_dist.bench.doctor_check import Check, size
from lepton_dist.bench.doctor_devices import bindings_of
from lepton_dist.bench.doctor_machine import Site
from lepton_dist.bench.inspect import world_size_of
from lepton_dist.config.sampling import Unusable, checkpoint_defaults
from lepton_dist.documents import Document
from lepton_dist.errors import CheckpointError, ConfigError, UsageError
from lepton_dist.model.registry import read_generation_config
from lepton_dist.parallel.requirements import weight_bytes
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import Dtypes, decide_dtypes
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.facts import RankFacts
from lepton_dist.runtime.fitting import num_blocks
from lepton_dist.runtime.opening import load_plan_document
from lepton_dist.text.tokenizer import Tokenizer


def check_model(site: Site, facts: Sequence[RankFacts], model: str) -> list[Check]:
    """The files of a checkpoint: configuration, weights, tokenizer, and the same on every node."""
    return [_check_files(model), _check_tokenizer(model), _check_seen(site, facts, model)]


def check_plan(
    site: Site, facts: Sequence[RankFacts], model: str | None, plan_file: str | None, dtype: str | None
) -> Check:
    """Whether a plan (None: the one that would be chosen) fits the job and, where a model is named, its memory."""
    try:
        plan, document = load_plan_document(plan_file)
        if plan is not None and plan.is_auto:
            return Check("plan", "OK", f"{plan_file}: mesh: auto; `generate` plans for its input, inside the job")
        if model is None:
            return _check_size(site, (plan or Plan()).laid_out(site.nodes), document)
        blueprint = _draw(model, (plan or Plan()).laid_out(site.nodes), document, len(site.hosts))
    except UsageError as error:
        return Check("plan", "FAIL", str(error), "correct the file, or start another number of ranks")
    return _check_memory(site, facts, blueprint, decide_dtypes(blueprint.plan.precision, dtype, blueprint.config.dtype))


def _check_files(model: str) -> Check:
    try:
        # Every plan reads the same headers and asks for the same tensors, so one rank will do.
        blueprint = Blueprint.draw(model, Plan.from_mesh(), 1)
        for value in checkpoint_defaults(read_generation_config(model)).values():
            if isinstance(value, Unusable):
                raise CheckpointError(value.problem)
    except UsageError as error:
        return Check("model", "FAIL", str(error), "copy the checkpoint anew, or name another directory")
    files = {tensor.file for tensor in blueprint.index.tensors.values()}
    shape = blueprint.config.shape
    return Check(
        "model",
        "OK",
        f"{blueprint.config.family}, {shape.num_layers} layers, {shape.num_heads} heads over {shape.num_kv_heads} KV "
        f"heads, context {blueprint.config.max_positions}; {len(blueprint.index.tensors)} tensors in {len(files)} "
        f"file(s), {size(blueprint.index.total_bytes)}, {blueprint.config.dtype}; none missing, all of the right shape",
    )


def _check_tokenizer(model: str) -> Check:
    if not (Path(model) / "tokenizer.json").is_file():
        advice = "rows must give prompt_token_ids; for text copy the checkpoint's tokenizer.json there"
        return Check("tokenizer", "WARN", f"{model} has no tokenizer.json", advice)
    try:
        tokenizer = Tokenizer.load(model)
    except UsageError as error:
        return Check("tokenizer", "FAIL", str(error), "copy the file anew from where the checkpoint comes from")
    if not tokenizer.has_chat_template:
        return Check("tokenizer", "OK", "loads; no chat template, so rows with `messages` are refused")
    return Check("tokenizer", "OK", "loads; has a chat template")


def _check_seen(site: Site, facts: Sequence[RankFacts], model: str) -> Check:
    """By fingerprint, as the first rank of each node sees it."""
    looked = [fact for fact in facts if fact.model]
    first = looked[0]
    advice = "put the model where every node sees the same files (not /tmp), and name it by that path"
    for other in looked:
        if other.model.startswith("error:"):
            return Check("model on nodes", "FAIL", f"{site.named(other.rank)}: {other.model[7:]}", advice)
        if other.model != first.model:
            found = f"{model} holds other files on {site.hosts[other.rank]} than on {site.hosts[first.rank]}"
            return Check("model on nodes", "FAIL", found, advice)
    return Check("model on nodes", "OK", f"{len(looked)} node(s) see the same files")


def _check_size(site: Site, plan: Plan, document: Document | None) -> Check:
    size_, needed = len(site.hosts), world_size_of(plan)
    is_wrong = needed != size_ if plan.mesh is not None else needed > size_
    source = document.source if document is not None else "the default plan"
    if is_wrong:
        found = f"{source} needs {needed} rank(s), the job has {size_}"
        return Check("plan", "FAIL", found, f"start {needed} rank(s), or correct the plan")
    return Check(
        "plan", "OK", f"{source} fits {size_} rank(s); with --model its layers, heads and memory are checked too"
    )


def _draw(model: str, plan: Plan, document: Document | None, world_size: int) -> Blueprint:
    try:
        return Blueprint.draw(model, plan, world_size)
    except ConfigError as error:
        raise (document.located(error) if document is not None else error) from None


def _check_memory(site: Site, facts: Sequence[RankFacts], blueprint: Blueprint, dtypes: Dtypes) -> Check:
    """The rank that has the least left over decides, by the rule by which a session opens."""
    kv_dtype: torch.dtype = getattr(torch, dtypes.kv_cache)
    tightest: tuple[int, Check] | None = None
    tokens: list[int] = []
    try:
        bindings = bindings_of(blueprint.plan, site, facts)
    except ConfigError as error:
        return Check("plan", "FAIL", str(error), "correct the plan's `device`, or the job's GPUs")
    for rank, seat in blueprint.seats.items():
        binding, held = bindings[rank], weight_bytes(blueprint.table, seat, dtypes)
        budget = facts[rank].memory_bytes
        if binding.gpu is not None:
            budget = facts[rank].gpus[binding.gpu].free_bytes // binding.sharers
        geometry = blueprint.geometry(seat, kv_dtype)
        try:
            # On a GPU the session measures what is left; here it is what the weights leave.
            is_gpu = binding.is_gpu
            blocks = num_blocks(blueprint, geometry, max(budget - held, 0) if is_gpu else budget, is_left=is_gpu)
        except ConfigError as error:
            return Check(
                "plan", "FAIL", f"{site.named(rank)}: {error}", "use more ranks a stage, or nodes with more memory"
            )
        tokens.append(blocks * geometry.block_tokens)
        kv_bytes = blocks * geometry.block_bytes
        left = budget - held - kv_bytes
        found = (
            f"{site.named(rank)} holds {size(held)} of weights ({dtypes.weights}) and {size(kv_bytes)} of KV cache, "
            f"and may use {size(budget)}" + ("" if binding.gpu is None else f" of GPU {binding.gpu}")
        )
        if tightest is None or left < tightest[0]:
            tightest = left, _verdict(found, left)
    assert tightest is not None  # a resolved plan has at least one rank
    check = tightest[1]
    spare = len(site.hosts) - len(blueprint.plan.ranks)
    note = f"; {spare} rank(s) left out" if spare else ""
    return Check(
        "plan", check.verdict, f"{check.found}; KV cache of {min(tokens)} tokens a replica{note}", check.advice
    )


def _verdict(found: str, left_bytes: int) -> Check:
    if left_bytes < 0:
        advice = "use more ranks, a smaller engine.kv_cache_bytes, or another dtype"
        return Check("plan", "FAIL", f"it does not fit: {found}", advice)
    return Check("plan", "OK", f"tightest: {found}")
