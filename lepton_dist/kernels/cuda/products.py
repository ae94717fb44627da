"""Products of few tokens with a matrix, and what lies around them, as functions of tensors.

Tensors are on one GPU (or, under Triton's interpreter, on the CPU), and contiguous. Launches go to torch's current
stream; nothing waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from lepton_dist.kernels.cuda.triton_product import add_product_kernel, enter_product_kernel, gated_product_kernel

MOST_TOKENS = 2
"""Of more tokens a matmul's own library is the faster: measured on an H200."""


class Tile(NamedTuple):
    """How a program goes through its rows of the matrix: `block` channels at a time, `stages` of them on their way."""

    rows: int
    block: int
    warps: int
    stages: int


# As measured on an H200, of those whose sums (rows x block x tokens) stay in registers.
_NORMED = {1: Tile(16, 256, 4, 4), 2: Tile(16, 256, 4, 4)}
_PLAIN = {1: Tile(16, 512, 8, 4), 2: Tile(8, 512, 4, 4)}


def tile_of(tokens: int, has_norm: bool) -> Tile:
    """The tile for 1 or 2 tokens, with a norm before the product or without one."""
    return (_NORMED if has_norm else _PLAIN)[tokens]


def add_product(hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """hidden float32 [tokens, out] += x [tokens, in] times weight [out, in], in place."""
    tokens, dim = x.shape
    out = weight.shape[0]
    tile = tile_of(tokens, False)
    grid = (triton.cdiv(out, tile.rows),)
    add_product_kernel[grid](x, weight, hidden, dim, out, *_constants(tokens, tile), num_warps=tile.warps)


def gated_product(hidden: torch.Tensor, gain: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
    """The RMS norm of hidden float32 [tokens, dim], times gate and up, weight [2 ffn, dim] -> silu(gate) * up.

    gain float32 [dim] -> [tokens, ffn] in the dtype of `weight`.
    """
    tokens, dim = hidden.shape
    ffn = weight.shape[0] // 2
    out = torch.empty((tokens, ffn), dtype=weight.dtype, device=hidden.device)
    tile = tile_of(tokens, True)
    grid = (triton.cdiv(2 * ffn, tile.rows),)
    sizes = dim, ffn, eps
    constants = _constants(tokens, tile)
    gated_product_kernel[grid](hidden, gain, weight, out, *sizes, *constants, num_warps=tile.warps)
    return out


def enter_product(
    hidden: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """The RMS norm of hidden float32 [tokens, dim], times weight [(heads + 2 kv_heads) * head_dim, dim], enters.

    As `kernels.attention.enter_cache`: rotates by angles float32 [tokens, 1, half], writes the arenas at slots
    [tokens], and returns the queries [tokens, heads, head_dim] in the dtype of `weight`. `head_dim` is even.
    """
    tokens, dim = hidden.shape
    kv_heads, block_tokens, head_dim = keys.shape[1:]
    heads = weight.shape[0] // head_dim - 2 * kv_heads
    query = torch.empty((tokens, heads, head_dim), dtype=weight.dtype, device=hidden.device)
    cos, sin = (table.contiguous() for table in angles) if angles is not None else (gain, gain)  # not looked at
    half = cos.shape[-1] if angles is not None else 0
    tile = tile_of(tokens, True)
    grid = (triton.cdiv(weight.shape[0], tile.rows),)
    tensors = hidden, gain, weight, cos, sin, slots, query, keys, values
    sizes = dim, heads, kv_heads, block_tokens, head_dim, half, eps
    constants = _constants(tokens, tile)
    enter_product_kernel[grid](*tensors, *sizes, *constants, num_warps=tile.warps)
    return query


def _constants(tokens: int, tile: Tile) -> tuple[int, int, int, int]:
    """TOKENS, ROWS, BLOCK, STAGES."""
    return tokens, tile.rows, tile.block, tile.stages
