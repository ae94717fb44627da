"""A batch run: rows in, rows out, nothing lost and nothing twice, whatever happens in between."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

from lepton_dist.config.generate import GenerateConfig
from lepton_dist.config.sampling import SamplingParams
from lepton_dist.errors import EXIT_DONE, EXIT_ROW_ERRORS, EXIT_STOPPED, OutputError, RequestError
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.decision_log import decision_log
from lepton_dist.runtime.intake import Intake, Opened
from lepton_dist.runtime.interrupts import Interrupts
from lepton_dist.runtime.opening import ModelRequest, draw_blueprint, load_plan_document, named_cluster, open_model
from lepton_dist.runtime.requests import Item, Prepared, RequestMaker, checkpoint_sampling, refused
from lepton_dist.runtime.run_files import check_run_files
from lepton_dist.runtime.run_report import write_report
from lepton_dist.storage.fingerprint import model_fingerprint
from lepton_dist.storage.job_file import read_job
from lepton_dist.storage.journal import Journal
from lepton_dist.storage.journal_writer import JournalWriter
from lepton_dist.storage.output_files import job_path
from lepton_dist.telemetry.progress import Progress
from lepton_dist.telemetry.streams import Show
from lepton_dist.telemetry.voice import notice
from lepton_dist.text.completion import RequestOutput
from lepton_dist.text.output import OutputFormatter
from lepton_dist.text.rows import BadRow, PromptRow
from lepton_dist.text.tokenizer import Tokenizer

EARLY_S = 0.3
"""An input that is read within so many seconds is judged before any rank loads."""
PROGRESS_EVERY_S = 0.5
MOST_A_TURN = 1024


def run_batch(controller: Controller, interrupts: Interrupts, config: GenerateConfig) -> int:
    """Run one batch from rank 0; returns the exit code over the whole output file.

    Raises:
        UsageError: the model, the plan, the input or the output is wrong.
        StoppedEarly: the disk is full.
        RankLostError: a rank is lost.
    """
    plan, document = load_plan_document(config.plan)
    check_run_files(config, plan.cluster if plan is not None else None)
    cluster = named_cluster(plan, controller.world.nodes)
    if plan is not None and plan.is_auto:
        from lepton_dist.runtime.auto_plan import plan_here  # not above: few runs need the planner, and all would wait

        plan, cluster = plan_here(controller, config, plan, cluster)
    request = ModelRequest(config.model, plan, config.dtype, config.threads, cluster)
    blueprint, dtypes = draw_blueprint(controller.world, request, document)
    checkpoint = checkpoint_sampling(config.model)
    tokenizer = _tokenizer(config.model)
    formatter = OutputFormatter(tokenizer, model=Path(config.model).resolve().name)
    identity = {
        "model": model_fingerprint(config.model),
        "dtype": dtypes.weights if dtypes.kv_cache == dtypes.weights else f"{dtypes.weights}, KV {dtypes.kv_cache}",
        "sampling": _sampling_identity(config, checkpoint),
    }
    today = _first_start(config) if tokenizer is not None and tokenizer.tells_date else None
    if today is not None:
        identity["date"] = today.isoformat()
    maker = _maker(blueprint, tokenizer, config, checkpoint, today)
    with Intake(config, identity, maker.prepare) as intake:
        # What is wrong with a small input, and a run that is complete, shows before anything is loaded.
        if intake.is_done(within_s=EARLY_S) and intake.opened().journal.is_complete:
            return _was_complete(intake.opened().journal)
        with decision_log(config.decision_log) as write:
            open_model(controller, request, document, write=write, drawn=(blueprint, dtypes))
            while not intake.is_done():
                controller.advance()
            opened = intake.opened()
            if opened.journal.is_complete:
                return _was_complete(opened.journal)
            if opened.journal.num_gone:
                notice(f"{opened.journal.num_gone} row(s) of the output are no longer in the input; they stay")
            interrupts.is_orderly = True
            with JournalWriter(opened.journal) as writer:
                run = BatchRun(controller, interrupts, writer, formatter, opened, config)
                is_stopped = run.to_end()
            return run.conclude(opened.journal, is_stopped=is_stopped)


def _was_complete(journal: Journal) -> int:
    notice(f"was complete already: {_rows(journal)}")
    return EXIT_ROW_ERRORS if journal.error_rows else EXIT_DONE


def _tokenizer(model: str) -> Tokenizer | None:
    """The model's tokenizer; None where it has none, which matters only to rows of text."""
    if not (Path(model) / "tokenizer.json").is_file():
        return None
    tokenizer = Tokenizer.load(model)
    if tokenizer.notice:
        notice(tokenizer.notice)
    return tokenizer


def _sampling_identity(config: GenerateConfig, checkpoint: dict[str, Any]) -> str:
    merged = {**checkpoint, **config.sampling, "seed": config.seed}
    return ", ".join(f"{name}={merged[name]!r}" for name in sorted(merged))


def _maker(
    blueprint: Blueprint,
    tokenizer: Tokenizer | None,
    config: GenerateConfig,
    checkpoint: dict[str, Any],
    today: datetime.datetime | None,
) -> RequestMaker:
    return RequestMaker(
        tokenizer,
        config.sampling,
        checkpoint,
        vocab=blueprint.config.shape.vocab,
        context_tokens=blueprint.context_tokens,
        base_seed=config.seed,
        today=today,
    )


def _first_start(config: GenerateConfig) -> datetime.datetime:
    """When this run was first started: a chat template that tells the date tells the same one when it is resumed."""
    now = datetime.datetime.now().replace(microsecond=0)
    path = job_path(Path(config.output).resolve())
    try:
        job = None if config.overwrite else read_job(path)
        return now if job is None else datetime.datetime.fromisoformat(job.identity.get("date", now.isoformat()))
    except (OSError, ValueError, OutputError):  # an output that cannot be used; who opens it says why
        return now


def _rows(journal: Journal) -> str:
    errors = f", {journal.error_rows} of them errors" if journal.error_rows else ""
    return f"{len(journal.done)} rows{errors}; results in {journal.path}"


class BatchRun:
    """The loop of a batch run. Rows count as done once they are on disk."""

    def __init__(
        self,
        controller: Controller,
        interrupts: Interrupts,
        writer: JournalWriter,
        formatter: OutputFormatter,
        opened: Opened,
        config: GenerateConfig,
    ) -> None:
        self._controller, self._interrupts, self._writer = controller, interrupts, writer
        self._formatter, self._ahead, self._config = formatter, opened.ahead, config
        self._progress = Progress(opened.num_rows, writer.num_done)
        self._show = Show()
        self._running: dict[str, tuple[PromptRow, SamplingParams]] = {}
        self._num_done, self._tokens, self._num_tokens = writer.num_done, 0, 0
        self._told_s = time.monotonic()

    def to_end(self) -> bool:
        """Run until every row is done, or until a signal's grace is over; whether it was the latter."""
        while self._feed() or self._controller.num_outstanding:
            self._collect()
            if self._interrupts.is_requested:
                self._wind_down()
                return True
        self._writer.flush()
        return False

    def conclude(self, journal: Journal, *, is_stopped: bool) -> int:
        """Say how it went, with all that was written on disk; returns the exit code."""
        self._tell()
        try:
            if is_stopped:
                self._progress.note(f"stopped early: {_rows(journal)}")
                return EXIT_STOPPED
            journal.complete()
            self._report()
            tokens_per_s, seconds = self._progress.tokens_per_s, self._progress.elapsed_s
            rate = f"{self._num_tokens} tokens in {seconds:.1f} s: {tokens_per_s:.1f} tokens/s"
            self._progress.note(f"done, {rate}: {_rows(journal)}")
            return EXIT_ROW_ERRORS if journal.error_rows else EXIT_DONE
        finally:
            self._progress.close()

    def _feed(self) -> bool:
        """Hand over what the balancer wants to see; False when the input is at its end."""
        for _ in range(MOST_A_TURN):  # rows that are all bad must not keep this rank from its turn
            item = self._ahead.take() if self._controller.wants_more and not self._interrupts.is_requested else None
            if item is None:
                break
            self._start(item)
        self._controller.expect_more(not self._ahead.is_exhausted)
        return not self._ahead.is_exhausted

    def _start(self, item: Item) -> None:
        if isinstance(item, Prepared):
            try:
                self._controller.check(item.request)
            except RequestError as error:
                item = refused(item.row, error)
        if isinstance(item, BadRow):
            self._writer.append(self._formatter.bad(item), key=item.key, is_error=True)
            return
        self._running[item.row.key] = (item.row, item.request.sampling)
        self._controller.submit(item.request)

    def _collect(self) -> None:
        for key, output in self._controller.advance():
            row, params = self._running.pop(key)
            if output.failure:
                failed = self._formatter.failed(row, "server_error", output.failure)
                self._writer.append(failed, key=key, is_error=True)
                continue
            self._tokens += sum(len(completion.token_ids) for completion in output.completions)
            self._writer.append(self._formatter.finished(row, params, output), key=key, is_error=False)
            if self._config.show:
                self._print(row, output)
        self._writer.check()
        if time.monotonic() - self._told_s > PROGRESS_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        num_done = self._writer.num_done
        self._progress.advance(num_done - self._num_done, self._tokens)
        self._num_done, self._num_tokens, self._tokens = num_done, self._num_tokens + self._tokens, 0
        self._told_s = time.monotonic()

    def _wind_down(self) -> None:
        """After a signal: admit nothing more, finish what fits the grace, leave the rest to the next start."""
        grace_s = self._config.grace_s
        name = self._interrupts.name
        self._progress.note(f"{name}: finishing what fits in {grace_s:g} s; the same command resumes")
        self._controller.drain()
        end = time.monotonic() + grace_s
        while self._controller.num_outstanding and time.monotonic() < end:
            self._collect()
        self._writer.flush()

    def _report(self) -> None:
        """Say how the ranks were used. The rows are safe: a report that cannot be written is worth a line."""
        try:
            told = write_report(Path(self._config.output).resolve(), self._controller.record())
        except OSError as error:
            told = f"the run's report could not be written: {error.strerror}"
        if told:
            self._progress.note(told)

    def _print(self, row: PromptRow, output: RequestOutput) -> None:
        for text in self._formatter.texts(output):
            fault = self._show(f"--- {row.id}\n{row.prompt or ''}{text}")
            if fault:
                notice(f"warning: texts are no longer shown: stdout: {fault}; the rows are written")
