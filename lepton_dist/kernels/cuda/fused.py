"""The Triton kernels as functions of tensors. Launches go to torch's current stream; nothing waits.

Tensors are on one GPU (or, under Triton's interpreter, on the CPU).
"""

from __future__ import annotations

import torch
import triton

from lepton_dist.kernels.cpu.tensors import has_heads_side_by_side
from lepton_dist.kernels.cuda.triton_attention import combine_kernel, decode_kernel
from lepton_dist.kernels.cuda.triton_pointwise import add_rms_norm_kernel, enter_cache_kernel, gated_silu_kernel

_GATED_CHANNELS = 1024
_CACHE_HEADS = 8
_TILE_TOKENS = 64
_LEAST_DOT = 16  # rows and columns of the smallest product of tensor cores
_MOST_SPLITS = 32
# Programs that keep a large GPU busy: two for each of some 130 multiprocessors.
_PROGRAMS = 264


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """hidden float32 [tokens, dim], contiguous, += delta, in place; its RMS norm in `dtype`."""
    rows, dim = hidden.shape
    out = torch.empty((rows, dim), dtype=dtype, device=hidden.device)
    if rows:
        block = triton.next_power_of_2(dim)
        source = hidden if delta is None else delta.contiguous()
        grid = (rows,)
        warps = max(min(block // 512, 16), 1)
        add_rms_norm_kernel[grid](hidden, source, weight, out, dim, eps, delta is not None, block, num_warps=warps)
    return out


def gated_silu(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, 2 ffn], contiguous -> silu(gate) * up [tokens, ffn]."""
    rows, ffn = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, ffn))
    if rows:
        gated_silu_kernel[(rows, triton.cdiv(ffn, _GATED_CHANNELS))](x, out, ffn, _GATED_CHANNELS)
    return out


def enter_cache(
    turned: torch.Tensor,
    value: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """As `kernels.attention.enter_cache`: rotate, write the cache, and return the queries [tokens, heads, dim]."""
    turned, value = _side_by_side(turned), _side_by_side(value)
    tokens, both, dim = turned.shape
    kv_heads, block_tokens = keys.shape[1:3]
    heads = both - kv_heads
    query = torch.empty((tokens, heads, dim), dtype=turned.dtype, device=turned.device)
    if not tokens:
        return query
    # [tokens, 1, half] with each token's row contiguous; without rope they are not looked at.
    cos, sin = (table.contiguous() for table in angles) if angles is not None else (turned, turned)
    half = cos.shape[-1] if angles is not None else 0
    sizes = (heads, kv_heads, block_tokens, dim, half)
    grid = (tokens, triton.cdiv(heads + 2 * kv_heads, _CACHE_HEADS))
    enter_cache_kernel[grid](
        turned,
        value,
        cos,
        sin,
        slots,
        query,
        keys,
        values,
        turned.stride(0),
        value.stride(0),
        *sizes,
        angles is not None,
        triton.next_power_of_2(dim),
        _CACHE_HEADS,
    )
    return query


def paged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """Attention of one new token a sequence.

    query [n, heads, dim]; arenas [blocks, kv_heads, block_tokens, dim]; tables [n, blocks]; lengths [n], where 0 gives
    zeros -> [n, heads, dim]. Softmax and sums in float32; scale 1 / sqrt(dim).
    """
    query = _side_by_side(query)
    count, heads, dim = query.shape
    kv_heads, block_tokens = keys.shape[1:3]
    group = heads // kv_heads
    out = torch.empty((count, heads, dim), dtype=query.dtype, device=query.device)
    if not count:
        return out
    splits = num_splits(count * kv_heads, tables.shape[1] * block_tokens)
    partial = torch.empty((count, heads, splits, dim), dtype=torch.float32, device=query.device)
    weights = torch.empty((count, heads, splits, 2), dtype=torch.float32, device=query.device)
    padded = max(triton.next_power_of_2(dim), _LEAST_DOT)
    decode_kernel[count, kv_heads, splits](
        query,
        keys,
        values,
        tables,
        lengths,
        partial,
        weights,
        dim**-0.5,
        window or 0,
        query.stride(0),
        tables.stride(0),
        kv_heads,
        group,
        dim,
        splits,
        block_tokens,
        window is not None,
        max(triton.next_power_of_2(group), _LEAST_DOT),
        padded,
        tile_tokens(query.dtype),
    )
    combine_kernel[(count * heads,)](partial, weights, out, splits, dim, triton.next_power_of_2(splits), padded)
    return out


def tile_tokens(dtype: torch.dtype) -> int:
    """Tokens that a program looks at together: fewer of a wide dtype, so that a tile fits every GPU's shared memory."""
    return _TILE_TOKENS // max(dtype.itemsize // 2, 1)


def num_splits(programs: int, most_tokens: int) -> int:
    """Parts of each context: enough to keep a GPU busy with `programs` beside them, and at least a tile long each."""
    return max(1, min(-(-_PROGRAMS // programs), -(-most_tokens // _TILE_TOKENS), _MOST_SPLITS))


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, dim] with each row contiguous, whatever lies between rows."""
    return x if has_heads_side_by_side(x) else x.contiguous()
