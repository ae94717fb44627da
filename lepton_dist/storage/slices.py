"""Reading slices of stored tensors straight into place, never more than one bounded buffer beside them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.errors import CheckpointError
from lepton_dist.plan.axes import Span
from lepton_dist.storage.index import StoredTensor

_BUFFER_BYTES = 16 << 20
_PIECE_BYTES = 4 << 20


class SliceReader:
    """Reads rectangles of stored tensors; keeps the files open while it is used as a context.

    `threads` read at once: what is cached costs a copy, and the first touch of every page that it goes to.
    """

    def __init__(self, threads: int = 1) -> None:
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(threads, "lepton-read")
        self._buffer = np.empty(0, dtype=np.uint8)
        self.bytes_read = 0

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, stored: StoredTensor, rows: Span, columns: Span | None, target: torch.Tensor) -> None:
        """Read ``stored[rows, columns]`` into `target`, converting its dtype.

        `target` has the rectangle's shape: [rows] or [rows, columns]; it may be any strided view, on any device.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        width = stored.shape[1] if len(stored.shape) > 1 else 1
        row_bytes = width * stored.dtype.itemsize
        is_whole = columns is None or (columns.start == 0 and columns.stop == width)
        offset = stored.offset + rows.start * row_bytes
        if is_whole and target.is_cpu and target.dtype == stored.dtype and target.is_contiguous():
            self._fill(stored, offset, target.view(-1).view(torch.uint8).numpy())
            return
        step = max(1, _BUFFER_BYTES // row_bytes)
        if self._buffer.nbytes < step * row_bytes:
            # A GPU reads pinned memory itself, without a copy of the driver's between.
            self._buffer = torch.empty(step * row_bytes, dtype=torch.uint8, pin_memory=target.is_cuda).numpy()
        for first in range(0, rows.size, step):
            count = min(step, rows.size - first)
            chunk = self._buffer[: count * row_bytes]
            self._fill(stored, offset + first * row_bytes, chunk)
            values = torch.from_numpy(chunk).view(stored.dtype)
            if len(stored.shape) > 1:
                values = values.view(count, width)
                values = values if columns is None else values[:, columns.start : columns.stop]
            target[first : first + count].copy_(values)

    def _fill(self, stored: StoredTensor, offset: int, target: NDArray[np.uint8]) -> None:
        view, total = target.data, target.nbytes
        try:
            if stored.file not in self._files:
                self._files[stored.file] = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._files[stored.file]

            def fill(start: int) -> int:
                """Read a piece; returns how many of its bytes the file does not have."""
                end = min(start + _PIECE_BYTES, total)
                while start < end:
                    count = os.preadv(descriptor, [view[start:end]], offset + start)
                    if count == 0:
                        break
                    start += count
                return end - start

            missing = sum(self._pool.map(fill, range(0, total, _PIECE_BYTES)))
        except OSError as error:
            raise CheckpointError(f"{stored.file}: cannot be read: {error.strerror}") from None
        if missing:
            raise CheckpointError(f"{stored.file}: is truncated: {stored.name!r} ends {missing} bytes early")
        self.bytes_read += total
