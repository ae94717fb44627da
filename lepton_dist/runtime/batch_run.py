"""A batch run: rows in, rows out, nothing lost and nothing twice, whatever happens in between."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_dist.config.generate import GenerateConfig
from lepton_dist.config.sampling import SamplingParams
from lepton_dist.errors import EXIT_DONE, EXIT_ROW_ERRORS, EXIT_STOPPED, RequestError
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.decision_log import decision_log
from lepton_dist.runtime.interrupts import Interrupts
from lepton_dist.runtime.opening import ModelRequest, draw_blueprint, load_plan_document, named_cluster, open_model
from lepton_dist.runtime.requests import Ahead, Item, Prepared, RequestMaker, checkpoint_sampling, refused
from lepton_dist.runtime.run_report import write_report
from lepton_dist.storage.fingerprint import file_digest, model_fingerprint
from lepton_dist.storage.journal import Journal
from lepton_dist.telemetry.progress import Progress
from lepton_dist.text.completion import RequestOutput
from lepton_dist.text.dialects import count_rows, is_text_path, open_input, read_rows
from lepton_dist.text.output import OutputFormatter, key_of_output
from lepton_dist.text.rows import BadRow, PromptRow
from lepton_dist.text.tokenizer import Tokenizer

SYNC_EVERY_S = 0.5
PREPARE_AHEAD = 512


def run_batch(controller: Controller, interrupts: Interrupts, config: GenerateConfig) -> int:
    """Run one batch from rank 0; returns the exit code over the whole output file.

    Raises:
        UsageError: the model, the plan, the input or the output is wrong.
        StoppedEarly: the disk is full.
        RankLostError: a rank is lost.
    """
    plan, document = load_plan_document(config.plan)
    cluster = named_cluster(plan, controller.world.nodes)
    if plan is not None and plan.is_auto:
        from lepton_dist.runtime.auto_plan import plan_here  # not above: few runs need the planner, and all would wait

        plan, cluster = plan_here(controller, config, plan, cluster)
    request = ModelRequest(config.model, plan, config.dtype, config.threads, cluster)
    blueprint, dtypes = draw_blueprint(controller.world, request, document)
    checkpoint = checkpoint_sampling(config.model)
    tokenizer = _tokenizer(config.model)
    formatter = OutputFormatter(tokenizer, model=Path(config.model).name)
    with open_input(config.input) as stream:
        identity = {
            "model": model_fingerprint(config.model),
            "input": file_digest(config.input),
            "dtype": dtypes.weights if dtypes.kv_cache == dtypes.weights else f"{dtypes.weights}, KV {dtypes.kv_cache}",
            "sampling": _sampling_identity(config, checkpoint),
        }
        journal = Journal.open(
            config.output, identity, key_of_output, overwrite=config.overwrite, retry_errors=config.retry_errors
        )
        with journal:
            if journal.is_complete:
                _summary(Progress(None, len(journal.done)), journal, "was complete already")
                return EXIT_ROW_ERRORS if journal.error_rows else EXIT_DONE
            maker = _maker(blueprint, tokenizer, config, checkpoint)
            rows = read_rows(stream, is_text=is_text_path(config.input))
            # While the ranks load, rows are read: the balancer wants to see many of them before it assigns the first.
            ahead = Ahead((row for row in rows if row.key not in journal.done), maker.prepare, PREPARE_AHEAD)
            try:
                with decision_log(config.decision_log) as write:
                    open_model(controller, request, document, write=write)
                    progress = Progress(count_rows(config.input), len(journal.done))
                    interrupts.is_orderly = True
                    try:
                        return BatchRun(controller, interrupts, journal, formatter, ahead, progress, config).to_end()
                    finally:
                        progress.close()
            finally:
                ahead.stop()


def _tokenizer(model: str) -> Tokenizer | None:
    """The model's tokenizer; None where it has none, which matters only to rows of text."""
    return Tokenizer.load(model) if (Path(model) / "tokenizer.json").is_file() else None


def _sampling_identity(config: GenerateConfig, checkpoint: dict[str, Any]) -> str:
    merged = {**checkpoint, **config.sampling, "seed": config.seed}
    return ", ".join(f"{name}={merged[name]!r}" for name in sorted(merged))


def _maker(
    blueprint: Blueprint, tokenizer: Tokenizer | None, config: GenerateConfig, checkpoint: dict[str, Any]
) -> RequestMaker:
    return RequestMaker(
        tokenizer,
        config.sampling,
        checkpoint,
        vocab=blueprint.config.shape.vocab,
        context_tokens=blueprint.context_tokens,
        base_seed=config.seed,
    )


def _summary(progress: Progress, journal: Journal, how: str) -> None:
    errors = f", {journal.error_rows} of them errors" if journal.error_rows else ""
    progress.note(f"{how}: {len(journal.done)} rows{errors}; results in {journal.path}")


@dataclass
class BatchRun:
    """The loop of a batch run. Rows count as done once they are on disk."""

    controller: Controller
    interrupts: Interrupts
    journal: Journal
    formatter: OutputFormatter
    ahead: Ahead
    progress: Progress
    config: GenerateConfig

    def __post_init__(self) -> None:
        self._running: dict[str, tuple[PromptRow, SamplingParams]] = {}
        self._tokens = self._num_tokens = 0
        self._synced_s = time.monotonic()

    def to_end(self) -> int:
        """Run until every row is done, or until a signal's grace is over."""
        while self._feed() or self.controller.num_outstanding:
            self._collect()
            if self.interrupts.is_requested:
                return self._wind_down()
        self._sync()
        self.journal.complete()
        self._report()
        rate = (
            f"{self._num_tokens} tokens in {self.progress.elapsed_s:.1f} s: {self.progress.tokens_per_s:.1f} tokens/s"
        )
        _summary(self.progress, self.journal, f"done, {rate}")
        return EXIT_ROW_ERRORS if self.journal.error_rows else EXIT_DONE

    def _feed(self) -> bool:
        """Hand over what the balancer wants to see; False when the input is at its end."""
        while self.controller.wants_more and not self.interrupts.is_requested:
            item = self.ahead.take()
            if item is None:
                break
            self._start(item)
        self.controller.expect_more(not self.ahead.is_exhausted)
        return not self.ahead.is_exhausted

    def _start(self, item: Item) -> None:
        if isinstance(item, Prepared):
            try:
                self.controller.check(item.request)
            except RequestError as error:
                item = refused(item.row, error)
        if isinstance(item, BadRow):
            self.journal.append(self.formatter.bad(item), key=item.key, is_error=True)
            return
        self._running[item.row.key] = (item.row, item.request.sampling)
        self.controller.submit(item.request)

    def _collect(self) -> None:
        for key, output in self.controller.advance():
            row, params = self._running.pop(key)
            self._tokens += sum(len(completion.token_ids) for completion in output.completions)
            self.journal.append(self.formatter.finished(row, params, output), key=key, is_error=False)
            if self.config.show:
                self._show(row, output)
        if time.monotonic() - self._synced_s > SYNC_EVERY_S:
            self._sync()

    def _sync(self) -> None:
        rows = self.journal.sync()
        self.progress.advance(rows, self._tokens)
        self._num_tokens += self._tokens
        self._tokens = 0
        self._synced_s = time.monotonic()

    def _wind_down(self) -> int:
        """After a signal: admit nothing more, finish what fits the grace, leave the rest to the next start."""
        self.progress.note(
            f"{self.interrupts.name}: finishing what fits in {self.config.grace_s:g} s; the same command resumes"
        )
        self.controller.drain()
        end = time.monotonic() + self.config.grace_s
        while self.controller.num_outstanding and time.monotonic() < end:
            self._collect()
        self._sync()
        _summary(self.progress, self.journal, "stopped early")
        return EXIT_STOPPED

    def _report(self) -> None:
        """Say how the ranks were used. The rows are safe: a report that cannot be written is worth a line."""
        try:
            told = write_report(Path(self.config.output), self.controller.record())
        except OSError as error:
            told = f"the run's report could not be written: {error.strerror}"
        if told:
            self.progress.note(told)

    def _show(self, row: PromptRow, output: RequestOutput) -> None:
        for text in self.formatter.texts(output):
            print(f"--- {row.id}\n{row.prompt or ''}{text}", flush=True)
