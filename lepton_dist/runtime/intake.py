"""The input of a batch run and the output that belongs to it: read once beside loading, then opened, then fed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from io import BufferedReader
from types import TracebackType
from typing import Self

from lepton_dist.config.generate import GenerateConfig
from lepton_dist.runtime.ahead import Ahead
from lepton_dist.runtime.requests import Item
from lepton_dist.storage.input_rows import survey
from lepton_dist.storage.journal import Journal
from lepton_dist.text.dialects import is_text_path, key_of_input, open_input, read_rows
from lepton_dist.text.output import key_of_output
from lepton_dist.text.rows import BadRow, PromptRow, key_of_id


@dataclass(frozen=True)
class Opened:
    """The output, open; how many rows the input has; and those without an answer, prepared ahead of need."""

    journal: Journal
    num_rows: int
    ahead: Ahead


class Intake:
    """Reads an input in a thread of its own. Use it in a ``with`` block, which closes the output.

    The input is read twice: once as a whole for what it is (`storage.input_rows`), which the output is opened by, and
    once row by row.

    Args:
        identity: all but the input that the rows of the output depend on.
        prepare: what becomes of a row.
    """

    def __init__(
        self, config: GenerateConfig, identity: Mapping[str, str], prepare: Callable[[PromptRow | BadRow], Item]
    ) -> None:
        self._config, self._identity, self._prepare = config, identity, prepare
        self._stream = open_input(config.input)
        self._result: Future[Opened] = Future()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._work, name="input", daemon=True)
        self._thread.start()

    def is_done(self, *, within_s: float = 0.0) -> bool:
        """Whether `opened` would answer at once, after waiting at most so long."""
        self._thread.join(within_s)
        return self._result.done()

    def opened(self) -> Opened:
        """Wait for the output to be open.

        Raises:
            UsageError: the input cannot be read, or as `Journal.open`.
            StoppedEarly: as `Journal.open`.
        """
        return self._result.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopped = True
        self._thread.join()
        if self._result.done() and self._result.exception() is None:
            opened = self._result.result()
            opened.ahead.stop()
            opened.journal.close()
        self._stream.close()

    def _work(self) -> None:
        try:
            self._result.set_result(self._open())
        except BaseException as error:  # handed to the thread that waits
            self._result.set_exception(error)

    def _open(self) -> Opened:
        config, is_text = self._config, is_text_path(self._config.input)
        with open_input(config.input) as lines:
            rows = survey(self._until_stopped(lines), _key_of_text if is_text else key_of_input)
        identity = {**self._identity, "input": rows.digest}
        journal = Journal.open(
            config.output,
            identity,
            key_of_output,
            rows=rows,
            overwrite=config.overwrite,
            retry_errors=config.retry_errors,
        )
        wanted = read_rows(self._stream, is_text=is_text)
        # While the ranks load, rows are read: the balancer wants to see many of them before it assigns the first.
        ahead = Ahead((row for row in wanted if row.key not in journal.done), self._prepare)
        return Opened(journal, len(rows), ahead)

    def _until_stopped(self, lines: BufferedReader) -> Iterator[bytes]:
        for line in lines:
            if self._is_stopped:
                raise InterruptedError("nobody waits for the input any more")
            yield line


def _key_of_text(line: bytes, number: int) -> str:
    return key_of_id(number)
