"""A thread that writes a journal, so that a slow disk holds up nobody who computes."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from lepton_dist.storage.journal import Journal

SYNC_EVERY_S = 0.5
MOST_WAITING_BYTES = 64 << 20
"""Rows that wait for the disk; beyond this `append` waits with them, so that memory stays bounded."""


class JournalWriter:
    """The only user of an open journal from its start to `close`. Use it in a ``with`` block.

    Attributes:
        num_done: rows on disk, over the whole file.
    """

    def __init__(self, journal: Journal, *, sync_every_s: float = SYNC_EVERY_S) -> None:
        self.num_done = len(journal.done)
        self._journal, self._sync_every_s = journal, sync_every_s
        self._changed = threading.Condition()
        self._waiting: list[tuple[bytes, str, bool]] = []
        self._waiting_bytes = 0
        self._num_unsynced = 0  # rows given to `append` that are not on disk
        self._wants_sync = self._is_closing = False
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def append(self, line: bytes, *, key: str, is_error: bool) -> None:
        """Add one row; it is on disk within about `sync_every_s` seconds, on a disk that keeps up.

        Raises:
            StoppedEarly, OutputError, LeptonError: as `Journal.append`, of an earlier row too.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._fault is not None or self._waiting_bytes <= MOST_WAITING_BYTES)
            self._check()
            self._waiting.append((line, key, is_error))
            self._waiting_bytes += len(line)
            self._num_unsynced += 1
            if len(self._waiting) == 1:
                self._changed.notify_all()

    def check(self) -> None:
        """See whether the disk has failed.

        Raises:
            StoppedEarly, OutputError: it has.
        """
        with self._changed:
            self._check()

    def flush(self) -> None:
        """Return when every row is on disk.

        Raises:
            StoppedEarly, OutputError: the disk has failed.
        """
        with self._changed:
            self._wants_sync = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._fault is not None or not self._num_unsynced)
            self._check()

    def close(self) -> None:
        """End the thread, with every row on disk unless the disk has failed."""
        with self._changed:
            self._is_closing = self._wants_sync = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as fault:  # handed to the thread that appends
            with self._changed:
                self._fault = fault
                self._changed.notify_all()

    def _turn(self) -> bool:
        """Write what has come in, and put it on disk when it is time; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing or self._wants_sync)
            is_last = self._is_closing and not self._waiting
        # Rows go to disk in company: whatever comes in meanwhile goes along.
        end = time.monotonic() + self._sync_every_s
        with self._changed:
            while not (self._wants_sync or self._is_closing) and (left_s := end - time.monotonic()) > 0:
                self._changed.wait(left_s)
            rows, self._waiting, self._waiting_bytes = self._waiting, [], 0
            self._wants_sync = False
            self._changed.notify_all()
        for line, key, is_error in rows:
            self._journal.append(line, key=key, is_error=is_error)
        self._journal.sync()
        with self._changed:
            self._num_unsynced -= len(rows)
            self.num_done += len(rows)
            self._changed.notify_all()
        return not is_last
