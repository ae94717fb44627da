"""Decode attention straight over the KV blocks, by the compiled kernel of `paged_attention.c`."""

from __future__ import annotations

import ctypes

import torch

from lepton_dist.kernels.cpu.native import native_library

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_WIDTH, _MAX_DIM, _MAX_GROUP = 16, 256, 16  # as in paged_attention.c


class _PagedCall(ctypes.Structure):
    """`struct paged_call` of paged_attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "output", "rows", "first", "last", "tables")),
        *(
            (name, ctypes.c_int64)
            for name in ("tasks", "table_width", "block_tokens", "heads", "kv_heads", "dim", "kind", "query_stride")
        ),
    )


def can_attend(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether the compiled kernel is there and takes these shapes and dtypes."""
    heads, dim = query.shape[1:]
    return (
        query.device.type == "cpu"
        and query.dtype == keys.dtype
        and query.dtype in _KINDS
        and dim % _WIDTH == 0
        and dim <= _MAX_DIM
        and heads // keys.shape[2] <= _MAX_GROUP
        and native_library() is not None
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    rows: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    tables: torch.Tensor,
) -> None:
    """Attend for some rows of a batch; only those rows of `output` are written.

    query [tokens, heads, dim] with heads side by side; keys, values [blocks, block_tokens, kv_heads, dim]; output
    [tokens, heads, dim], contiguous; rows int64 [n]; each sees positions [first, last) int64 [n] of its own blocks
    tables int64 [n, blocks]. Scores, softmax and sums are float32.

    Raises:
        ValueError: `can_attend` would have said no.
    """
    library = native_library()
    if library is None or query.stride(2) != 1 or query.stride(1) != query.shape[2]:
        raise ValueError("the compiled attention kernel is missing, or the query's heads do not lie side by side")
    tensors = (query, keys, values, output, rows, first, last, tables)
    call = _PagedCall(
        *(tensor.data_ptr() for tensor in tensors),
        rows.numel(),
        tables.shape[1],
        keys.shape[1],
        query.shape[1],
        keys.shape[2],
        query.shape[2],
        _KINDS[query.dtype],
        query.stride(0),
    )
    if library.lepton_paged_attention(ctypes.byref(call), torch.get_num_threads()):
        raise ValueError(f"the compiled attention kernel does not take the shape {tuple(query.shape)}")
