"""Norms, rope, KV writes and gating in one pass each, by the compiled kernels of `pointwise.c`.

Each function checks all that its kernel assumes. Where the kernel is not there, takes no such tensors, or would lose a
gradient, nothing is done and the answer is None or False: the caller goes torch's way.
"""

from __future__ import annotations

import ctypes

import torch

from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.kernels.cpu.tensors import KINDS, are_side_by_side, is_dense
from lepton_dist.kernels.gradients import needs_gradient

MAX_HALF = 256
"""Channels of half a head that can be rotated, as in pointwise.c."""
MAX_DIM = 256
"""Channels of a head that can be normed, likewise."""


def library_for(*tensors: torch.Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, if they are there and take tensors of these dtypes on this device, without a gradient."""
    for tensor in tensors:
        if tensor.dtype not in KINDS or not tensor.is_cpu:
            return None
    return None if needs_gradient(*tensors) else native_library()


def rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """hidden float32 [tokens, dim] += delta, in place; its norm in `dtype`, with weight float32 [dim].

    All must be contiguous, and delta of `dtype`.
    """
    if dtype not in KINDS or hidden.dim() != 2:
        return None
    rows, dim = hidden.shape
    if not (is_dense(hidden, torch.float32, rows * dim) and is_dense(weight, torch.float32, dim)):
        return None
    if delta is not None and not (is_dense(delta, dtype, rows * dim) and delta.shape == hidden.shape):
        return None
    library = native_library()
    if library is None or needs_gradient(hidden, delta, weight):
        return None
    y = torch.empty((rows, dim), dtype=dtype)
    places = (hidden.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), y.data_ptr())
    library.lepton_rms_norm(*places, rows, dim, KINDS[dtype], eps, torch.get_num_threads())
    return y


def gated_silu(x: torch.Tensor) -> torch.Tensor | None:
    """x [tokens, 2 ffn], contiguous -> silu(gate) * up [tokens, ffn]."""
    if x.dim() != 2 or x.shape[1] % 2 or not x.is_contiguous() or (library := library_for(x)) is None:
        return None
    rows, ffn = x.shape[0], x.shape[1] // 2
    y = torch.empty((rows, ffn), dtype=x.dtype)
    library.lepton_gated_silu(x.data_ptr(), y.data_ptr(), rows, ffn, KINDS[x.dtype], torch.get_num_threads())
    return y


def arg_max(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """scores float32 [rows, n], n at least 1, contiguous -> `Tensor.max(dim=1)`, but at a tie the lowest index."""
    if scores.dim() != 2 or not scores.shape[1] or not is_dense(scores, torch.float32, scores.numel()):
        return None
    if (library := library_for(scores)) is None:
        return None
    rows, count = scores.shape
    largest, ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    places = (scores.data_ptr(), largest.data_ptr(), ids.data_ptr())
    library.lepton_arg_max(*places, rows, count, torch.get_num_threads())
    return largest, ids


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Rotate x [tokens, heads, head_dim] in place; cos, sin float32 [tokens, 1, half], contiguous.

    The heads of a token lie side by side.
    """
    shape, strides, half = x.shape, x.stride(), cos.shape[-1]
    if len(shape) != 3 or not are_side_by_side(shape, strides) or (library := library_for(x)) is None:
        return False
    rows, heads, dim = shape
    has_angles = is_dense(cos, torch.float32, rows * half) and is_dense(sin, torch.float32, rows * half)
    if not has_angles or half > MAX_HALF or 2 * half > dim or (rows > 1 and strides[0] < heads * dim):
        return False
    places = (x.data_ptr(), cos.data_ptr(), sin.data_ptr())
    library.lepton_rotate(*places, rows, heads, dim, half, strides[0], KINDS[x.dtype], torch.get_num_threads())
    return True


def norm_heads(x: torch.Tensor, heads: int, query_weight: torch.Tensor, key_weight: torch.Tensor, eps: float) -> bool:
    """The RMS norm of each head of x [tokens, heads + kv_heads, head_dim], in place; weights float32 [head_dim].

    The heads of a token lie side by side.
    """
    shape, strides = x.shape, x.stride()
    if len(shape) != 3 or not are_side_by_side(shape, strides) or not 0 <= heads <= shape[1] or shape[2] > MAX_DIM:
        return False
    rows, both, dim = shape
    has_weights = is_dense(query_weight, torch.float32, dim) and is_dense(key_weight, torch.float32, dim)
    if not has_weights or (rows > 1 and strides[0] < both * dim) or (library := library_for(x)) is None:
        return False
    if needs_gradient(query_weight, key_weight):
        return False
    places = x.data_ptr(), query_weight.data_ptr(), key_weight.data_ptr()
    sizes = rows, heads, both - heads, dim, strides[0], KINDS[x.dtype]
    library.lepton_norm_heads(*places, *sizes, eps, torch.get_num_threads())
    return True


def write_cache(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> bool:
    """Put key and value [tokens, kv_heads, head_dim], of one layout, into slots int64 [tokens] of the arenas.

    keys, values [blocks, kv_heads, block_tokens, head_dim]; a slot is block * block_tokens + place in the block.

    Raises:
        IndexError: a slot is outside of the arenas; nothing was written.
    """
    shape, strides, arena, kind, cache_kind = key.shape, key.stride(), keys.shape, key.dtype, keys.dtype
    if len(shape) != 3 or len(arena) != 4 or kind not in KINDS or cache_kind not in KINDS:
        return False
    rows, heads, dim = shape
    is_alike = value.shape == shape and value.stride() == strides and value.dtype == kind and value.is_cpu
    fits = arena[1] == heads and arena[3] == dim and are_side_by_side(shape, strides) and key.is_cpu
    if not (is_alike and fits and are_arenas(keys, values) and is_dense(slots, torch.int64, rows)):
        return False
    if (library := native_library()) is None or needs_gradient(key, value, keys, values):
        return False
    places = (key.data_ptr(), value.data_ptr(), slots.data_ptr(), keys.data_ptr(), values.data_ptr())
    sizes = rows, heads, dim, arena[2], arena[0], strides[0], KINDS[kind], KINDS[cache_kind]
    if library.lepton_write_cache(*places, *sizes, torch.get_num_threads()):
        raise IndexError(f"a slot is outside of the {arena[0]} blocks of {arena[2]} tokens")
    return True


def are_arenas(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether keys and values lie alike, without gaps."""
    return (
        keys.shape == values.shape
        and keys.dtype == values.dtype
        and keys.is_contiguous()
        and values.is_contiguous()
        and values.is_cpu
    )
