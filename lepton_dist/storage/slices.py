"""Reading slices of stored tensors straight into place, never more than one bounded buffer beside them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.plan.axes import Span
from lepton_dist.storage.safetensors_header import StoredTensor
from lepton_dist.storage.weight_files import WeightFiles, truncated, unreadable

_BUFFER_BYTES = 16 << 20
_PIECE_BYTES = 4 << 20
_LEAST_SPARED = 16 << 10  # of a row: less is copied faster than a call for each row takes


class SliceReader:
    """Reads rectangles of stored tensors; keeps the files open while it is used as a context.

    `threads` read at once: what is cached costs a copy, and the first touch of every page that it goes to.
    """

    def __init__(self, threads: int = 1) -> None:
        self._files = WeightFiles()
        self._pool = ThreadPoolExecutor(threads, "lepton-read")
        self._buffer = np.empty(0, dtype=np.uint8)
        self.bytes_read = 0

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._files.close()

    def read(self, stored: StoredTensor, rows: Span, columns: Span | None, target: torch.Tensor) -> None:
        """Read ``stored[rows, columns]`` into `target`, converting its dtype.

        `target` has the rectangle's shape: [rows] or [rows, columns]; it may be any strided view, on any device.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        width = stored.shape[1] if len(stored.shape) > 1 else 1
        row_bytes, dtype = width * stored.itemsize, getattr(torch, stored.dtype)
        is_whole = columns is None or (columns.start == 0 and columns.stop == width)
        offset = stored.offset + rows.start * row_bytes
        if is_whole and target.is_cpu and target.dtype == dtype and target.is_contiguous():
            self._fill(stored, offset, target.view(-1).view(torch.uint8).numpy())
            return
        step = max(1, _BUFFER_BYTES // row_bytes)
        if self._buffer.nbytes < step * row_bytes:
            # A GPU reads pinned memory itself, without a copy of the driver's between.
            self._buffer = torch.empty(step * row_bytes, dtype=torch.uint8, pin_memory=target.is_cuda).numpy()
        for first in range(0, rows.size, step):
            count = min(step, rows.size - first)
            place = offset + first * row_bytes
            if columns is not None and self._is_sparse(stored, columns, row_bytes, place, count):
                values = self._columns(stored, columns, row_bytes, place, count).view(dtype)
            else:
                chunk = self._buffer[: count * row_bytes]
                self._fill(stored, place, chunk)
                values = torch.from_numpy(chunk).view(dtype)
                if len(stored.shape) > 1:
                    values = values.view(count, width)
                    values = values if columns is None else values[:, columns.start : columns.stop]
            target[first : first + count].copy_(values)

    def _is_sparse(self, stored: StoredTensor, columns: Span, row_bytes: int, offset: int, count: int) -> bool:
        """Whether rows are to be read one by one, without what is not wanted: as in load_rows.c, only from memory."""
        descriptor, skipped = self._files.open(stored.file), columns.start * stored.itemsize
        ends = (offset + skipped, offset + (count - 1) * row_bytes + skipped)
        is_worth = row_bytes - columns.size * stored.itemsize >= _LEAST_SPARED
        return is_worth and all(_is_cached(descriptor, end) for end in ends)

    def _columns(self, stored: StoredTensor, columns: Span, row_bytes: int, offset: int, count: int) -> torch.Tensor:
        """The wanted columns of `count` rows from `offset` on: uint8 [rows, bytes]."""
        kept, descriptor = columns.size * stored.itemsize, self._files.open(stored.file)
        start, chunk = offset + columns.start * stored.itemsize, self._buffer[: count * kept].reshape(count, kept)
        many = max(1, _PIECE_BYTES // kept)

        def piece(first: int) -> int:
            rows = range(first, min(first + many, count))
            return sum(_fetch(descriptor, chunk[row], start + row * row_bytes) for row in rows)

        try:
            missing = sum(self._pool.map(piece, range(0, count, many)))
        except OSError as error:
            raise unreadable(stored.file, error.errno) from None
        if missing:
            raise truncated(stored, missing)
        self.bytes_read += chunk.nbytes
        return torch.from_numpy(chunk)

    def _fill(self, stored: StoredTensor, offset: int, target: NDArray[np.uint8]) -> None:
        descriptor = self._files.open(stored.file)

        def piece(start: int) -> int:
            return _fetch(descriptor, target[start : start + _PIECE_BYTES], offset + start)

        try:
            missing = sum(self._pool.map(piece, range(0, target.nbytes, _PIECE_BYTES)))
        except OSError as error:
            raise unreadable(stored.file, error.errno) from None
        if missing:
            raise truncated(stored, missing)
        self.bytes_read += target.nbytes


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether the system has this byte in its memory, so that a read only copies it."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # not there, or not a file system that can tell
        return False


def _fetch(descriptor: int, target: NDArray[np.uint8], offset: int) -> int:
    """Fill `target` from a file; returns how many of its bytes the file does not have."""
    view, done = target.data, 0
    while done < target.nbytes:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return target.nbytes - done
