"""Items prepared by a thread of its own, ahead of need, within bounds of rows and of tokens."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from lepton_dist.runtime.requests import Item, Prepared
from lepton_dist.text.rows import BadRow, PromptRow

MOST_ROWS = 512
MOST_TOKENS = 1 << 20  # some 36 MB of prompts; one that is longer is prepared alone


class Ahead:
    """Prepares items ahead of need: at most `most_rows` of them, of at most `most_tokens` prompt tokens together.

    `take` never waits. An error of the thread comes out of `take`, behind the items that were prepared before it.
    """

    def __init__(
        self,
        rows: Iterable[PromptRow | BadRow],
        prepare: Callable[[PromptRow | BadRow], Item],
        *,
        most_rows: int = MOST_ROWS,
        most_tokens: int = MOST_TOKENS,
    ) -> None:
        self._most_rows, self._most_tokens = most_rows, most_tokens
        self._changed = threading.Condition()
        self._items: deque[Item] = deque()
        self._tokens = 0
        self._is_over = self._is_stopped = False
        self._error: BaseException | None = None
        self.is_exhausted = False
        self._thread = threading.Thread(target=self._work, args=(iter(rows), prepare), name="tokenizer", daemon=True)
        self._thread.start()

    def take(self) -> Item | None:
        """The next item; None when none is ready, or none is left (then `is_exhausted`).

        Raises:
            LeptonError: whatever reading or preparing a row has raised.
        """
        with self._changed:
            if self._items:
                item = self._items.popleft()
                self._tokens -= _tokens(item)
                self._changed.notify_all()
                return item
            self.is_exhausted = self._is_over
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            return None

    def stop(self) -> None:
        """End the thread; what it has prepared is given up."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self, rows: Iterator[PromptRow | BadRow], prepare: Callable[[PromptRow | BadRow], Item]) -> None:
        error: BaseException | None = None
        try:
            for row in rows:
                if not self._put(prepare(row)):
                    break
        except BaseException as fault:  # handed to the thread that takes
            error = fault
        with self._changed:
            self._is_over, self._error = True, error

    def _put(self, item: Item) -> bool:
        """Wait until there is room; False when nobody wants more."""
        tokens = _tokens(item)
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._has_room(tokens))
            self._items.append(item)
            self._tokens += tokens
            return not self._is_stopped

    def _has_room(self, tokens: int) -> bool:
        return not self._items or (len(self._items) < self._most_rows and self._tokens + tokens <= self._most_tokens)


def _tokens(item: Item) -> int:
    return len(item.request.prompt) if isinstance(item, Prepared) else 0
