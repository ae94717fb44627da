"""Progress of a batch run on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

LINE_EVERY_S = 10.0


class Progress:
    """Rows done and tokens per second, on stderr by default. `total_rows` is None where the input is not counted."""

    def __init__(self, total_rows: int | None, done_rows: int, stream: TextIO | None = None) -> None:
        self._stream, self._total, self._rows = stream or sys.stderr, total_rows, done_rows
        self._start_s = self._line_s = time.monotonic()
        self._first_rows = done_rows
        self._tokens = 0
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total_rows, initial=done_rows, unit="row", file=self._stream)

    def advance(self, rows: int, tokens: int) -> None:
        """`rows` more rows are on disk; `tokens` more tokens were generated."""
        self._rows += rows
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(rows)
            self._bar.set_postfix_str(f"{self.tokens_per_s:.0f} tokens/s", refresh=False)
        elif time.monotonic() - self._line_s >= LINE_EVERY_S:
            self._line_s = time.monotonic()
            self.note(self._line())

    def note(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(f"lepton-dist: {text}", file=self._stream)
        else:
            print(f"lepton-dist: {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second since the start."""
        return self._tokens / max(self.elapsed_s, 1e-9)

    def _line(self) -> str:
        left = ""
        rows = self._rows - self._first_rows
        if self._total is not None and rows:
            left = f", {(self._total - self._rows) * self.elapsed_s / rows:.0f} s left"
        total = "" if self._total is None else f" of {self._total}"
        return f"{self._rows}{total} rows, {self.tokens_per_s:.0f} tokens/s{left}"
