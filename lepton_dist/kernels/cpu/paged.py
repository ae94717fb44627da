"""Attention straight over the KV blocks, by the compiled kernel of `paged_attention.c`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.kernels.cpu.native import native_library, vector_level
from lepton_dist.kernels.cpu.pointwise import are_arenas
from lepton_dist.kernels.cpu.structures import pack_paged
from lepton_dist.kernels.cpu.tensors import KINDS, are_side_by_side, is_dense
from lepton_dist.kernels.gradients import needs_gradient

_WIDTH, _MAX_DIM, _MAX_ROWS = 8, 256, 32  # as in paged_attention.c


def can_attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the compiled kernel is there and takes these tensors: query [tokens, heads, dim] and two arenas."""
    shape, arena = query.shape, keys.shape
    return (
        len(shape) == 3
        and len(arena) == 4
        and query.dtype in KINDS
        and keys.dtype in KINDS
        and query.is_cpu
        and shape[2] == arena[3]
        and are_side_by_side(shape, query.stride())
        and are_arenas(keys, values)
        and can_attend_with(shape[1], arena[1], shape[2])
        and not needs_gradient(query, keys, values)
    )


def can_attend_with(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the compiled kernel is there and takes these heads."""
    is_whole = kv_heads > 0 and heads % kv_heads == 0 and 0 < heads <= kv_heads * _MAX_ROWS
    return is_whole and 0 < head_dim <= _MAX_DIM and head_dim % _WIDTH == 0 and native_library() is not None


class PagedTasks:
    """The work of a batch, cut into tasks of a few query tokens, for `group` query heads a KV head.

    spans int64 [sequences, 3]: first row, rows, tokens in the cache; tables int64 [sequences, blocks], padded.

    Raises:
        ValueError: spans and tables do not fit each other.
    """

    def __init__(self, spans: NDArray[np.int64], tables: torch.Tensor, group: int) -> None:
        starts, counts, lengths = spans.T
        self._tables = tables.to(torch.int64).contiguous()
        self._table_width = self._tables.shape[1] if self._tables.dim() == 2 else 0
        self._check(starts, counts, lengths)
        most = max(_MAX_ROWS // group, 1)
        pieces = -(-counts // most)
        of = np.repeat(np.arange(len(spans)), pieces)
        offsets = (np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
        rows = np.minimum(most, counts[of] - offsets)
        seen = (lengths - counts)[of] + offsets + 1
        tasks = np.stack([starts[of] + offsets, rows, seen, of], axis=1)
        # The longest last, where the kernel begins.
        self._tasks = np.ascontiguousarray(tasks[np.argsort(rows * seen, kind="stable")], dtype=np.int64)
        self._rows = int((starts + counts).max(initial=0))
        self._keys = int(lengths.max(initial=0))
        self._blocks = int(self._tables.max()) + 1 if self._tables.numel() else 0
        self._places = self._tasks.ctypes.data, self._tables.data_ptr(), len(tasks), self._table_width, vector_level()
        self._known: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int] = (None, None, None, 0)

    def knows(self, rows: int, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor) -> bool:
        """Whether angles float32 [rows, 1, half] and slots int64 [rows] are as the kernels read them.

        They are those of the batch, the same for all layers: asked about once, they are known again.
        """
        known_cos, known_sin, known_slots, known_rows = self._known
        if cos is known_cos and sin is known_sin and slots is known_slots and rows == known_rows:
            return True
        count = rows * cos.shape[-1]
        if not (is_dense(cos, torch.float32, count) and is_dense(sin, torch.float32, count)):
            return False
        if not is_dense(slots, torch.int64, rows):
            return False
        self._known = cos, sin, slots, rows
        return True

    def for_shapes(self, rows: int, blocks: int, block_tokens: int) -> tuple[int, int, int, int, int]:
        """Tasks, tables, number of tasks, width of tables and vector level, for arenas of such blocks.

        The addresses are of memory that lives as long as this batch.

        Raises:
            ValueError: the batch has more rows, or its tables name blocks that are not there.
        """
        if self._rows > rows or self._blocks > blocks or self._keys > self._table_width * block_tokens:
            raise ValueError(
                f"a batch of {self._rows} rows, up to {self._keys} tokens and {self._blocks} blocks does not fit "
                f"{rows} rows, {self._table_width} blocks of {block_tokens} tokens a sequence, and {blocks} blocks"
            )
        return self._places

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None) -> torch.Tensor:
        """query [tokens, heads, dim], arenas [blocks, kv_heads, block_tokens, dim] that `can_attend` takes -> as query.

        Scores, softmax and sums are float32; scale 1 / sqrt(dim).

        Raises:
            ValueError: the batch does not fit them, or the kernel is missing.
        """
        library = native_library()
        if library is None:
            raise ValueError("the compiled attention kernel is missing")
        (tokens, heads, dim), (blocks, kv_heads, block_tokens, _) = query.shape, keys.shape
        *places, level = self.for_shapes(tokens, blocks, block_tokens)
        output = torch.empty((tokens, heads, dim), dtype=query.dtype)
        tensors = query.data_ptr(), keys.data_ptr(), values.data_ptr(), output.data_ptr()
        sizes = block_tokens, heads, kv_heads, dim, KINDS[query.dtype], KINDS[keys.dtype], query.stride(0), window or 0
        if library.lepton_paged_attention(pack_paged(*tensors, *places, *sizes, torch.get_num_threads(), level)):
            raise ValueError(f"the compiled attention kernel does not take the shape {(tokens, heads, dim)}")
        return output

    def _check(self, starts: NDArray[np.int64], counts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        tables = self._tables
        is_sound = tables.dim() == 2 and tables.is_cpu and len(tables) >= len(counts)
        is_ordered = (starts >= 0).all() and (counts >= 0).all() and (counts <= lengths).all()
        if not (is_sound and is_ordered) or (tables.numel() and int(tables.min()) < 0):
            raise ValueError(
                f"block tables {tuple(tables.shape)} on {tables.device} do not fit {len(counts)} sequences: they are "
                "[sequences, blocks] on the CPU, no block below 0, and no sequence has more new tokens than tokens"
            )
