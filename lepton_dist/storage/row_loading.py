"""Rows of stored matrices, read and packed into panels by threads that hold no lock of Python's. Without torch.

By `lepton_load_rows` of load_rows.c.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Thread

from lepton_dist.errors import CheckpointError
from lepton_dist.kernels.cpu import structures
from lepton_dist.kernels.cpu.native import KINDS, address_of, native_library
from lepton_dist.kernels.cpu.panels import Panels
from lepton_dist.plan.axes import Span
from lepton_dist.storage.safetensors_header import StoredTensor
from lepton_dist.storage.weight_files import WeightFiles, truncated, unreadable

_PIECE_BYTES = 1 << 20  # read and packed at once by a thread: a piece that is still in its cache when it is packed


@dataclass(frozen=True)
class RowRun:
    """``stored[rows, columns]``, which becomes the rows of a parameter from `first` on, the first of a panel."""

    stored: StoredTensor
    rows: Span
    columns: Span
    first: int


class RowLoading:
    """Runs of rows on their way into panels, in their order; close it.

    Raises:
        CheckpointError: a file cannot be opened.
    """

    def __init__(self, runs: Sequence[tuple[RowRun, Panels]]) -> None:
        self._runs = [run for run, _ in runs]
        self._files = WeightFiles()
        self._thread: Thread | None = None
        self._targets = (structures.RowRun * len(runs))()
        pieces = 0
        try:
            for target, (run, panels) in zip(self._targets, runs, strict=True):
                self._describe(target, run, panels)
                target.pieces_before = pieces
                pieces += -(-target.rows // target.step)
        except CheckpointError:
            self._files.close()
            raise
        self._state = structures.RowLoading(self._targets, len(runs), pieces, failed=-1)

    @property
    def done(self) -> float:
        """The part of the pieces that were begun, from 0 to 1."""
        begun, pieces = int(self._state.next), int(self._state.num_pieces)
        return min(begun / max(pieces, 1), 1.0)

    def begin(self) -> None:
        """Read and pack in a thread of its own, while this one does something else."""
        self._thread = Thread(target=self._load, args=(1,), name="lepton-load", daemon=True)
        self._thread.start()

    def finish(self, threads: int) -> None:
        """Read and pack what is left; the panels are then filled.

        Raises:
            CheckpointError: a file ends early or cannot be read.
        """
        self._load(threads)
        self._join()
        if self._state.failed >= 0:
            stored, target = self._runs[self._state.failed].stored, self._targets[self._state.failed]
            if self._state.error:
                raise unreadable(stored.file, self._state.error)
            end = target.offset + target.rows * target.row_bytes
            raise truncated(stored, end - os.fstat(target.file).st_size)

    def close(self) -> None:
        """Stop, whatever is left, and close the files."""
        self._state.next = self._state.num_pieces
        self._join()
        self._files.close()

    def _load(self, threads: int) -> None:
        library = native_library()
        if library is not None:  # without it there are no panels, and no runs
            library.lepton_load_rows(ctypes.addressof(self._state), threads)

    def _join(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _describe(self, target: structures.RowRun, run: RowRun, panels: Panels) -> None:
        stored, itemsize = run.stored, run.stored.itemsize
        row_bytes = stored.shape[1] * itemsize
        target.pack, target.to, target.kind = address_of(panels.kernels.pack), panels.place, KINDS[stored.dtype]
        target.file, target.offset = self._files.open(stored.file), stored.offset + run.rows.start * row_bytes
        target.row_bytes = row_bytes
        target.skipped, target.kept = run.columns.start * itemsize, run.columns.size * itemsize
        target.first, target.rows = run.first, run.rows.size
        target.step = max(1, _PIECE_BYTES // (row_bytes * panels.rows)) * panels.rows
