"""Triton kernels that multiply few tokens with a matrix [out, in], and do in the same launch what lies around it.

Memory is what such a product waits for: the matrix is read once, several blocks ahead, and everything else is small
beside it. A program owns whole rows of the matrix, whose sums it adds up in one order: every run gives the same bits.
Sums are float32; products are rounded to the matrix's dtype before they go on, as those of a plain matmul are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(
    x,
    gain,
    weight,
    row,
    is_row,
    dim,
    eps,
    HAS_NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x [tokens, dim], or its RMS norm, times `row` int64 [ROWS] of weight [out, dim] -> [ROWS] for each of TOKENS.

    The scale of a norm is a factor of its product, which takes it at the end: x need not be read before. Sums stay in
    two dims, one tensor for each token: so every thread keeps the channels that it loaded, 16 bytes at a time.
    """
    total, square = (), ()
    for _ in tl.static_range(TOKENS):
        total = total + (tl.zeros([ROWS, BLOCK], tl.float32),)
        square = square + (tl.zeros([BLOCK], tl.float32),)
    for start in tl.range(0, dim, BLOCK, num_stages=STAGES):
        channel = start + tl.arange(0, BLOCK)
        is_channel = channel < dim
        at = row[:, None] * dim + channel[None, :]
        w = tl.load(weight + at, mask=is_row[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        sums, squares = (), ()
        for token in tl.static_range(TOKENS):
            a = tl.load(x + token * dim + channel, mask=is_channel, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares = squares + (square[token] + a * a,)
                a *= tl.load(gain + channel, mask=is_channel, other=0.0)
            else:
                squares = squares + (square[token],)
            sums = sums + (total[token] + w * a[None, :],)
        total, square = sums, squares
    products = ()
    for token in tl.static_range(TOKENS):
        y = tl.sum(total[token], axis=1)
        if HAS_NORM:
            y *= tl.rsqrt(tl.sum(square[token], axis=0) / dim + eps)
        products = products + (y.to(weight.dtype.element_ty).to(tl.float32),)
    return products


@triton.jit
def add_product_kernel(
    x,
    weight,
    hidden,
    dim,
    out,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ROWS channels of hidden float32 [tokens, out] += x [tokens, dim] times weight [out, dim]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    products = _product(x, x, weight, row, row < out, dim, 0.0, False, TOKENS, ROWS, BLOCK, STAGES)
    is_inside = row < out
    for token in tl.static_range(TOKENS):
        place = hidden + token * out + row
        tl.store(place, tl.load(place, mask=is_inside) + products[token], mask=is_inside)


@triton.jit
def gated_product_kernel(
    hidden,
    gain,
    weight,
    out,
    dim,
    ffn,
    eps,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ROWS / 2 channels of out [tokens, ffn] = silu(gate) * up.

    Of hidden float32 [tokens, dim] the RMS norm is multiplied with weight [2 ffn, dim], which holds gate, then up.
    """
    PAIRS: tl.constexpr = ROWS // 2
    first = tl.program_id(0).to(tl.int64) * PAIRS
    member = tl.arange(0, ROWS)
    pair = first + member // 2  # a gate and its up are neighbours
    row = pair + member % 2 * ffn
    products = _product(hidden, gain, weight, row, pair < ffn, dim, eps, True, TOKENS, ROWS, BLOCK, STAGES)
    channel = first + tl.arange(0, PAIRS)
    for token in tl.static_range(TOKENS):
        gate, up = tl.split(tl.reshape(products[token], [PAIRS, 2]))
        y = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + token * ffn + channel, y.to(out.dtype.element_ty), mask=channel < ffn)


@triton.jit
def enter_product_kernel(
    hidden,
    gain,
    weight,
    cos,
    sin,
    slots,
    query,
    keys,
    values,
    dim,
    heads,
    kv_heads,
    block_tokens,
    head_dim,
    half,
    eps,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ROWS / 2 pairs of channels that turn together, of the heads + 2 kv_heads that weight [out, dim] has in its rows.

    Of hidden float32 [tokens, dim] the RMS norm is multiplied; cos and sin are float32 [tokens, half]. As in
    `enter_cache_kernel` query [tokens, heads, head_dim] takes the rotated queries, and the arenas [blocks, kv_heads,
    block_tokens, head_dim] the rest at slots [tokens]. `head_dim` is even.
    """
    PAIRS: tl.constexpr = ROWS // 2
    first = tl.program_id(0).to(tl.int64) * PAIRS
    pairs = head_dim // 2
    total = (heads + 2 * kv_heads) * pairs
    # Channel c of the first half turns against c + half; those from 2 * half on do not turn, and are paired alike.
    member = tl.arange(0, ROWS)
    pair = first + member // 2
    inside = pair % pairs
    low = tl.where(inside < half, inside, inside + half)
    reach = tl.where(inside < half, half, pairs - half)
    row = pair // pairs * head_dim + low + member % 2 * reach
    products = _product(hidden, gain, weight, row, pair < total, dim, eps, True, TOKENS, ROWS, BLOCK, STAGES)
    pair = first + tl.arange(0, PAIRS)
    head, inside = pair // pairs, pair % pairs
    low = tl.where(inside < half, inside, inside + half)
    high = low + tl.where(inside < half, half, pairs - half)
    key_head, value_head = head - heads, head - heads - kv_heads
    is_value = (value_head >= 0) & (pair < total)
    is_key = (key_head >= 0) & (value_head < 0)
    turns = (inside < half) & (value_head < 0)
    for token in tl.static_range(TOKENS):
        a, b = tl.split(tl.reshape(products[token], [PAIRS, 2]))
        c = tl.load(cos + token * half + inside, mask=turns, other=1.0)
        s = tl.load(sin + token * half + inside, mask=turns, other=0.0)
        x, y = a * c - b * s, b * c + a * s
        place = query + (token * heads + head) * head_dim
        tl.store(place + low, x.to(query.dtype.element_ty), mask=(key_head < 0))
        tl.store(place + high, y.to(query.dtype.element_ty), mask=(key_head < 0))
        slot = tl.load(slots + token).to(tl.int64)
        block, within = slot // block_tokens, slot % block_tokens
        place = keys + ((block * kv_heads + key_head) * block_tokens + within) * head_dim
        tl.store(place + low, x.to(keys.dtype.element_ty), mask=is_key)
        tl.store(place + high, y.to(keys.dtype.element_ty), mask=is_key)
        place = values + ((block * kv_heads + value_head) * block_tokens + within) * head_dim
        tl.store(place + low, x.to(values.dtype.element_ty), mask=is_value)
        tl.store(place + high, y.to(values.dtype.element_ty), mask=is_value)
