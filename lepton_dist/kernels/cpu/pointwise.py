"""Norms, rope, KV writes and gating in one pass each, by the compiled kernels of `pointwise.c`.

Each function is given the library, which says that it is there, and takes what its `can_` function agrees to.
"""

from __future__ import annotations

import ctypes

import torch

from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.kernels.cpu.tensors import KINDS, has_heads_side_by_side

MAX_HALF = 256
"""Channels of half a head that can be rotated, as in pointwise.c."""


def library_for(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, if they are there and take tensors of these dtypes on this device."""
    for tensor in tensors:
        if tensor.dtype not in KINDS or not tensor.is_cpu:
            return None
    return native_library()


def rms_norm(
    library: ctypes.CDLL,
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """hidden float32 [tokens, dim] += delta, in place; its norm in `dtype`. All contiguous, delta of `dtype`."""
    y = torch.empty(hidden.shape, dtype=dtype)
    places = (hidden.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), y.data_ptr())
    library.lepton_rms_norm(*places, *hidden.shape, KINDS[dtype], eps, torch.get_num_threads())
    return y


def gated_silu(library: ctypes.CDLL, x: torch.Tensor) -> torch.Tensor:
    """x [tokens, 2 ffn], contiguous -> silu(gate) * up [tokens, ffn]."""
    rows, ffn = x.shape[0], x.shape[1] // 2
    y = x.new_empty((rows, ffn))
    library.lepton_gated_silu(x.data_ptr(), y.data_ptr(), rows, ffn, KINDS[x.dtype], torch.get_num_threads())
    return y


def arg_max(library: ctypes.CDLL, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scores float32 [rows, n], n at least 1, contiguous -> `Tensor.max(dim=1)`, but at a tie the lowest index."""
    rows, count = scores.shape
    largest, ids = scores.new_empty(rows), torch.empty(rows, dtype=torch.int64)
    places = (scores.data_ptr(), largest.data_ptr(), ids.data_ptr())
    library.lepton_arg_max(*places, rows, count, torch.get_num_threads())
    return largest, ids


def can_rotate(x: torch.Tensor, half: int) -> bool:
    """Whether the heads of x [tokens, heads, head_dim] lie side by side and are short enough."""
    return has_heads_side_by_side(x) and half <= MAX_HALF


def rotate(library: ctypes.CDLL, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate x [tokens, heads, head_dim] in place; cos, sin float32 [tokens, 1, half], contiguous."""
    places = (x.data_ptr(), cos.data_ptr(), sin.data_ptr())
    library.lepton_rotate(*places, *x.shape, cos.shape[-1], x.stride(0), KINDS[x.dtype], torch.get_num_threads())


def write_cache(
    library: ctypes.CDLL,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Put key and value [tokens, kv_heads, head_dim], of one layout, into slots int64 [tokens] of the arenas.

    keys, values [blocks, kv_heads, block_tokens, head_dim]; a slot is block * block_tokens + place in the block.
    """
    places = (key.data_ptr(), value.data_ptr(), slots.data_ptr(), keys.data_ptr(), values.data_ptr())
    kinds = (KINDS[key.dtype], KINDS[keys.dtype])
    library.lepton_write_cache(*places, *key.shape, keys.shape[2], key.stride(0), *kinds, torch.get_num_threads())
