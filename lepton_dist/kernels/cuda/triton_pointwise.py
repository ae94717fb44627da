"""Triton kernels for what lies between matmuls: residual and norm, rope and KV write, gated activation.

Each reads its inputs once and writes its outputs elsewhere, except the residual, of which every program owns a row: so
no program, and no thread within one, writes what another still reads. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_rms_norm_kernel(hidden, delta, weight, out, dim, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    """One row: hidden float32 [rows, dim] += delta [rows, dim], then out [rows, dim] = its norm. BLOCK >= dim."""
    column = tl.arange(0, BLOCK)
    is_inside = column < dim
    at = tl.program_id(0).to(tl.int64) * dim + column
    x = tl.load(hidden + at, mask=is_inside, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta + at, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(hidden + at, x, mask=is_inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps)
    y = x * scale * tl.load(weight + column, mask=is_inside, other=0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def gated_silu_kernel(x, out, ffn, BLOCK: tl.constexpr):
    """BLOCK channels of one row: x [rows, 2 ffn] holds gate, then up; out [rows, ffn] = silu(gate) * up."""
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = channel < ffn
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(x + row * 2 * ffn + channel, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * ffn + ffn + channel, mask=is_inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * ffn + channel, y.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def enter_cache_kernel(
    turned,
    value,
    cos,
    sin,
    slots,
    query,
    keys,
    values,
    turned_stride,
    value_stride,
    heads,
    kv_heads,
    block_tokens,
    dim,
    half,
    HAS_ROPE: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
):
    """HEADS heads of one token, of the heads + 2 kv_heads that queries, keys and values have in this order.

    turned [tokens, heads + kv_heads, dim] and value [tokens, kv_heads, dim] have their heads side by side; cos and sin
    are float32 [tokens, half]; query [tokens, heads, dim] takes the rotated queries; keys and values, the arenas
    [blocks, kv_heads, block_tokens, dim], take the rest at slots [tokens]. DIM >= dim.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, DIM)
    is_inside = (channel < dim)[None, :]
    is_turned = (head < heads + kv_heads)[:, None] & is_inside
    row = turned + token * turned_stride + head[:, None] * dim
    x = tl.load(row + channel[None, :], mask=is_turned, other=0.0).to(tl.float32)
    if HAS_ROPE:
        # Channel c of the first half turns against c + half; channels from 2 * half on stay as they are.
        is_first = channel < half
        turns = channel < 2 * half
        partner = tl.where(is_first, channel + half, tl.where(turns, channel - half, channel))
        angle = tl.where(is_first, channel, channel - half)
        across = tl.load(row + partner[None, :], mask=is_turned, other=0.0).to(tl.float32)
        c = tl.load(cos + token * half + angle, mask=turns, other=1.0)
        s = tl.load(sin + token * half + angle, mask=turns, other=0.0)
        s = tl.where(is_first, -s, s)
        x = x * c[None, :] + across * s[None, :]
    is_query = (head < heads)[:, None] & is_inside
    place = query + (token * heads + head)[:, None] * dim + channel[None, :]
    tl.store(place, x.to(query.dtype.element_ty), mask=is_query)
    slot = tl.load(slots + token).to(tl.int64)
    block, inside = slot // block_tokens, slot % block_tokens
    key_head = head - heads
    key_at = ((block * kv_heads + key_head) * block_tokens + inside)[:, None] * dim + channel[None, :]
    tl.store(keys + key_at, x.to(keys.dtype.element_ty), mask=is_turned & (head >= heads)[:, None])
    value_head = key_head - kv_heads
    is_value = ((value_head >= 0) & (value_head < kv_heads))[:, None] & is_inside
    v = tl.load(value + token * value_stride + value_head[:, None] * dim + channel[None, :], mask=is_value, other=0.0)
    value_at = ((block * kv_heads + value_head) * block_tokens + inside)[:, None] * dim + channel[None, :]
    tl.store(values + value_at, v.to(values.dtype.element_ty), mask=is_value)
