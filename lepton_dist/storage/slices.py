"""Reading slices of stored tensors straight into place, never more than one bounded buffer beside them."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.errors import CheckpointError
from lepton_dist.plan.axes import Span
from lepton_dist.storage.index import StoredTensor

_BUFFER_BYTES = 16 << 20


class SliceReader:
    """Reads rectangles of stored tensors; keeps the files open while it is used as a context."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._buffer = np.empty(0, dtype=np.uint8)
        self.bytes_read = 0

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, stored: StoredTensor, rows: Span, columns: Span | None, target: torch.Tensor) -> None:
        """Read ``stored[rows, columns]`` into `target`, converting its dtype.

        `target` has the rectangle's shape: [rows] or [rows, columns]; it may be any strided view.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        width = stored.shape[1] if len(stored.shape) > 1 else 1
        row_bytes = width * stored.dtype.itemsize
        is_whole = columns is None or (columns.start == 0 and columns.stop == width)
        offset = stored.offset + rows.start * row_bytes
        if is_whole and target.dtype == stored.dtype and target.is_contiguous():
            self._fill(stored, offset, target.view(-1).view(torch.uint8).numpy())
            return
        step = max(1, _BUFFER_BYTES // row_bytes)
        if self._buffer.nbytes < step * row_bytes:
            self._buffer = np.empty(step * row_bytes, dtype=np.uint8)
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
        view = target.data
        done = 0
        try:
            if stored.file not in self._files:
                self._files[stored.file] = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._files[stored.file]
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{stored.file}: is truncated: {stored.name!r} ends {len(view) - done} bytes early"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{stored.file}: cannot be read: {error.strerror}") from None
        self.bytes_read += done
