"""The output of a batch run as a journal: whole rows, appended, on disk before they count, resumable after any death.

Four files: the output itself, ``OUTPUT.job.json`` (what run this is, and whether it is complete), ``OUTPUT.job.rows``
(what its input's rows were, see `input_rows`) and, while a run writes, ``OUTPUT.lock``. A row counts as done once
`Journal.sync` has returned; rows after the last sync may be lost by a crash, and are then done again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from lepton_dist.errors import LeptonError, OutputError
from lepton_dist.storage.durable import output_fault, remove_draft, replace_file, sync_directory, write_all
from lepton_dist.storage.input_rows import InputRows, write_input_rows
from lepton_dist.storage.job_file import COMPLETE, RUNNING, Job, check_same_run, read_job, write_job
from lepton_dist.storage.journal_lock import OutputLock
from lepton_dist.storage.output_files import job_path, rows_path, usable_path

KeyOfRow = Callable[[bytes], tuple[str, bool] | None]
"""From a row to its key and whether it is an error row; None for a line that is no row."""

_BATCH_BYTES = 1 << 20


class Journal:
    """An output that is open for appending. Open it with `Journal.open`; use it in a ``with`` block, or `close` it.

    Attributes:
        path: the output.
        done: keys of the rows that are on disk.
        ok_rows, error_rows: how many of these are results and errors, over the whole file.
        is_complete: every row of the input is done, as `complete` has recorded.
        is_exclusive: False on a file system without locks, where a second writer would go unseen.
        num_gone: rows of the output that the input has no longer; they stay.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], rows: InputRows | None, lock: OutputLock) -> None:
        self.path = path
        self.done: set[str] = set()
        self.ok_rows = 0
        self.error_rows = 0
        self.is_complete = False
        self.is_exclusive = lock.is_exclusive
        self.num_gone = 0
        self._identity = dict(identity)
        self._rows = rows
        self._job_path, self._rows_path = job_path(path), rows_path(path)
        self._lock = lock
        self._descriptor = -1
        self._durable_bytes = 0
        self._written_bytes = 0
        # Rows not yet written; of every row that is not yet durable whether it is an error, and its bytes, in order.
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0
        self._pending: dict[str, tuple[bool, int]] = {}
        self._fault: LeptonError | None = None

    @classmethod
    def open(
        cls,
        output: str | Path,
        identity: Mapping[str, str],
        key_of_row: KeyOfRow,
        *,
        rows: InputRows | None = None,
        overwrite: bool = False,
        retry_errors: bool = False,
        wait_s: float = 10.0,
    ) -> Self:
        """Start an output, or resume it where a run with the same identity left it.

        A torn last line is cut; lines that are no rows, and second rows of one key, are taken out.

        Args:
            output: the file; links are followed. Its directory must exist.
            identity: all that the rows depend on, as short texts by name; with `rows` the input's digest as ``input``.
            key_of_row: see `KeyOfRow`.
            rows: the rows of the input; with them another ``input`` goes on with an output whose rows are all in it
                as they were.
            overwrite: forget what is there.
            retry_errors: take the error rows out, so that they are not done.
            wait_s: how long to wait for another writer to die.

        Raises:
            OutputError: the place cannot be written, another run writes there, its rows are another run's, or a row
                of the input that is done has changed.
            StoppedEarly: the disk is full or failing.
        """
        try:
            path = usable_path(Path(output))
            journal = cls(path, identity, rows, OutputLock.acquire(path, wait_s=wait_s))
            try:
                journal._start(key_of_row, overwrite=overwrite, retry_errors=retry_errors)
            except BaseException:
                journal._release()
                raise
        except OSError as error:
            raise output_fault(error, Path(output), "before the first new row") from None
        return journal

    def append(self, line: bytes, *, key: str, is_error: bool) -> None:
        """Add one row, ending in a newline. It reaches the disk at the next `sync`, in company.

        Raises:
            LeptonError: the key is in the output already, or the line is not one line.
            StoppedEarly, OutputError: as `sync`.
        """
        self._check_usable()
        if key in self.done or key in self._pending:
            raise LeptonError(f"row {key} is in the output already; each row is written once")
        if not line or line.find(b"\n") != len(line) - 1:
            raise LeptonError(f"row {key} must be one line that ends in a newline")
        self._pending[key] = is_error, len(line)
        self._buffer.append(line)
        self._buffered_bytes += len(line)
        if self._buffered_bytes >= _BATCH_BYTES:
            self._write()

    def sync(self) -> int:
        """Put all rows on disk and count them as done; how many were added by this.

        Raises:
            StoppedEarly: the disk is full or failing; the output ends in a whole row and can be resumed.
            OutputError: another fault of the output.
        """
        self._check_usable()
        if not self._pending:
            return 0
        self._write()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            # What was written since the last sync may be lost or not: it is taken back, so that it is surely not there.
            self._give_up(error, self._durable_bytes)
        return self._count_pending(self._written_bytes)

    def complete(self) -> None:
        """Sync, and record that every row of the input is done.

        Raises:
            StoppedEarly, OutputError: as `sync`.
        """
        self.sync()
        if self.is_complete:
            return
        try:
            # Its directory is not synced: should that be lost, the next start finds every row done, and says so again.
            self._write_state(COMPLETE)
        except OSError as error:
            raise output_fault(error, self.path, self._progress()) from None
        self.is_complete = True

    def close(self) -> None:
        """Sync what is left, unless the output has failed before, and let the next writer in.

        Raises:
            StoppedEarly, OutputError: as `sync`; the output is closed all the same.
        """
        if self._descriptor < 0:
            return
        try:
            if self._fault is None:
                self.sync()
        finally:
            self._release()

    def _release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, key_of_row: KeyOfRow, *, overwrite: bool, retry_errors: bool) -> None:
        """Bring the files into the state of a run in progress. The order of steps matters: each may be the last."""
        remove_draft(self._job_path)
        remove_draft(self.path)
        job = None if overwrite else read_job(self._job_path)
        if overwrite:
            # Without a job file the rows belong to nobody, so they can never be taken for rows of the new run.
            self._job_path.unlink(missing_ok=True)
            self._rows_path.unlink(missing_ok=True)
            sync_directory(self.path.parent)
        # Asked of the open file: a network file system may remember for a while that a file was absent.
        self._open_output(os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        has_rows = self._durable_bytes > 0
        if has_rows and not overwrite:
            if job is None:
                raise OutputError(
                    f"{self.path}: exists, and {self._job_path.name} is not beside it, so its rows cannot be told from "
                    "this run's; choose another output, or start anew with --overwrite"
                )
            done = self._read_rows(key_of_row, retry_errors=retry_errors)
            self.num_gone = check_same_run(self.path, job, self._identity, self._rows, done)
        if overwrite:
            # The rows must be gone for good before a job file says that what is there is this run's.
            os.ftruncate(self._descriptor, 0)
            os.fsync(self._descriptor)
            self._durable_bytes = self._written_bytes = 0
            has_rows = False
        elif has_rows:
            self._recover(job, key_of_row, retry_errors=retry_errors)
        is_known = job is not None and job.identity == self._identity
        self.is_complete = job is not None and is_known and job.state == COMPLETE and job.rows == len(self.done)
        self.is_complete = self.is_complete and has_rows
        if not self.is_complete and (job is None or job.state != RUNNING or not is_known):
            if self._rows is not None:
                # First: the job file must never name an input whose rows are not known.
                write_input_rows(self._rows_path, self._rows)
            self._write_state(RUNNING)
        sync_directory(self.path.parent)

    def _open_output(self, flags: int) -> None:
        self._descriptor = os.open(self.path, flags, 0o666)
        size = os.fstat(self._descriptor).st_size
        self._durable_bytes = self._written_bytes = size

    def _recover(self, job: Job | None, key_of_row: KeyOfRow, *, retry_errors: bool) -> None:
        """Read what earlier runs left; take out what cannot stay."""
        # A killed run leaves rows that the system has and the disk has not; they count from here on, so they must last.
        os.fsync(self._descriptor)
        kept_bytes, is_clean = 0, True
        for line, row in self._read_rows(key_of_row, retry_errors=retry_errors):
            kept_bytes += len(line) if row is not None and is_clean else 0
            is_clean = is_clean and row is not None
            if row is not None:
                key, is_error = row
                self.done.add(key)
                self._count(is_error)
        if is_clean and kept_bytes == self._durable_bytes:
            return
        if job is not None and job.state == COMPLETE:
            # Before rows go: a run that dies in between must not leave an output that calls itself complete.
            self._write_state(RUNNING)
            sync_directory(self.path.parent)
        if is_clean:
            os.ftruncate(self._descriptor, kept_bytes)
            os.fsync(self._descriptor)
            self._durable_bytes = self._written_bytes = kept_bytes
            return
        mode = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
        self.done.clear()
        rows = self._read_rows(key_of_row, retry_errors=retry_errors)
        replace_file(self.path, self._remembered(rows), mode=mode)
        os.close(self._descriptor)
        self._descriptor = -1
        self._open_output(os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)

    def _remembered(self, rows: Iterator[tuple[bytes, tuple[str, bool] | None]]) -> Iterator[bytes]:
        for line, row in rows:
            if row is not None:
                self.done.add(row[0])
                yield line

    def _read_rows(
        self, key_of_row: KeyOfRow, *, retry_errors: bool
    ) -> Iterator[tuple[bytes, tuple[str, bool] | None]]:
        """Every whole line and, unless it must go, its key and kind. The caller adds the key to `done` at once."""
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                row = key_of_row(line)
                if row is not None and (row[0] in self.done or (row[1] and retry_errors)):
                    row = None
                yield line, row

    def _write(self) -> None:
        """Hand the buffered rows to the system. On a fault, rows that fitted are kept, whole, and made durable."""
        data = b"".join(self._buffer)
        try:
            write_all(self._descriptor, data)
        except OSError as error:
            written = os.fstat(self._descriptor).st_size - self._written_bytes
            self._give_up(error, self._written_bytes + data.rfind(b"\n", 0, max(written, 0)) + 1)
        self._written_bytes += len(data)
        self._buffer, self._buffered_bytes = [], 0

    def _give_up(self, error: OSError, kept_bytes: int) -> None:
        """Cut the output to whole rows and refuse any more.

        Raises:
            StoppedEarly, OutputError: always.
        """
        try:
            os.ftruncate(self._descriptor, kept_bytes)
            os.fsync(self._descriptor)
            self._count_pending(kept_bytes)
        except OSError as second:
            # The next start cuts a torn line anyway; the first fault is the one to tell.
            error.add_note(f"and then, cutting the output to whole rows: {second.strerror}")
        self._fault = output_fault(error, self.path, self._progress())
        raise self._fault from error

    def _count_pending(self, end: int) -> int:
        """Count the rows up to byte `end` of the output as done; how many these are."""
        added = 0
        for key, (is_error, num_bytes) in self._pending.items():
            if self._durable_bytes + num_bytes > end:
                break
            self._durable_bytes += num_bytes
            self.done.add(key)
            self._count(is_error)
            added += 1
        self._pending = {}
        return added

    def _count(self, is_error: bool) -> None:
        if is_error:
            self.error_rows += 1
        else:
            self.ok_rows += 1

    def _write_state(self, state: str) -> None:
        job = Job(state=state, identity=self._identity, rows=len(self.done))
        write_job(self._job_path, job)

    def _progress(self) -> str:
        return f"after {len(self.done)} rows"

    def _check_usable(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._descriptor < 0:
            raise LeptonError(f"{self.path}: the output is closed")
