"""Attention straight over the KV blocks, by the compiled kernel of `paged_attention.c`."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.kernels.cpu.native import native_library, vector_level
from lepton_dist.kernels.cpu.tensors import KINDS, has_heads_side_by_side

_WIDTH, _MAX_DIM, _MAX_ROWS = 8, 256, 32  # as in paged_attention.c


class _PagedCall(ctypes.Structure):
    """`struct paged_call` of paged_attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "output", "tasks", "tables")),
        *((name, ctypes.c_int64) for name in ("num_tasks", "table_width", "block_tokens", "heads", "kv_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("kind", "cache_kind", "query_stride", "window", "threads", "level")),
    )


def can_attend(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether the compiled kernel is there and takes these shapes and dtypes."""
    return (
        query.device.type == "cpu"
        and query.dtype in KINDS
        and keys.dtype in KINDS
        and has_heads_side_by_side(query)
        and can_attend_with(query.shape[1], keys.shape[1], query.shape[2])
    )


def can_attend_with(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the compiled kernel is there and takes these heads."""
    has_room = head_dim <= _MAX_DIM and heads // kv_heads <= _MAX_ROWS
    return head_dim % _WIDTH == 0 and has_room and native_library() is not None


class PagedTasks:
    """The work of a batch, cut into tasks of a few query tokens, for `group` query heads a KV head.

    spans int64 [sequences, 3]: first row, rows, tokens in the cache; tables int64 [sequences, blocks], padded.
    """

    def __init__(self, spans: NDArray[np.int64], tables: torch.Tensor, group: int) -> None:
        starts, counts, lengths = spans.T
        most = max(_MAX_ROWS // group, 1)
        pieces = -(-counts // most)
        of = np.repeat(np.arange(len(spans)), pieces)
        offsets = (np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
        rows = np.minimum(most, counts[of] - offsets)
        seen = (lengths - counts)[of] + offsets + 1
        tasks = np.stack([starts[of] + offsets, rows, seen, of], axis=1)
        self._tasks = tasks[np.argsort(rows * seen, kind="stable")]  # the longest last, where the kernel begins
        self._tables = tables
        self._call = _PagedCall(
            tasks=self._tasks.ctypes.data,
            tables=tables.data_ptr(),
            num_tasks=len(tasks),
            table_width=tables.shape[1],
            threads=torch.get_num_threads(),
            level=vector_level(),
        )

    @property
    def address(self) -> int:
        """Of the `struct paged_call` of this batch, without tensors."""
        return ctypes.addressof(self._call)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, window: int | None
    ) -> None:
        """query and output [tokens, heads, dim], arenas [blocks, kv_heads, block_tokens, dim]; `output` is contiguous.

        Scores, softmax and sums are float32; scale 1 / sqrt(dim).

        Raises:
            ValueError: `can_attend` would have said no.
        """
        library, call = native_library(), self._call
        if library is None:
            raise ValueError("the compiled attention kernel is missing")
        _, call.kv_heads, call.block_tokens, call.dim = keys.shape
        call.query, call.keys, call.values = query.data_ptr(), keys.data_ptr(), values.data_ptr()
        call.output, call.heads, call.query_stride = output.data_ptr(), query.shape[1], query.stride(0)
        call.kind, call.cache_kind, call.window = KINDS[query.dtype], KINDS[keys.dtype], window or 0
        if library.lepton_paged_attention(ctypes.byref(call)):
            raise ValueError(f"the compiled attention kernel does not take the shape {tuple(query.shape)}")
