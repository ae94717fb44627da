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
            chunk = self._buffer[: count * row_bytes]
            self._fill(stored, offset + first * row_bytes, chunk)
            values = torch.from_numpy(chunk).view(dtype)
            if len(stored.shape) > 1:
                values = values.view(count, width)
                values = values if columns is None else values[:, columns.start : columns.stop]
            target[first : first + count].copy_(values)

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


def _fetch(descriptor: int, target: NDArray[np.uint8], offset: int) -> int:
    """Fill `target` from a file; returns how many of its bytes the file does not have."""
    view, done = target.data, 0
    while done < target.nbytes:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return target.nbytes - done
