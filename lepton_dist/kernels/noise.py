"""Counter-based noise: a hash of (key, token id), so that any shard of the vocabulary can be perturbed on its own.

The hash is two rounds of the 32-bit finaliser "lowbias32" (Chris Wellons' hash prospector); the perturbation is Gumbel
noise, which makes an arg-max a sample of the softmax (arXiv:1611.01144).
"""

from __future__ import annotations

import hashlib

import torch

_SHIFT_MASKS = {16: 0xFFFF, 15: 0x1FFFF}


def noise_key(seed: int, sample: int, position: int) -> tuple[int, int]:
    """Two signed 32-bit words that name one draw: of a request's seed (64 bits), a sample index and a position."""
    data = (seed & (2**64 - 1)).to_bytes(8, "little") + sample.to_bytes(4, "little") + position.to_bytes(4, "little")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def gumbel(keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise float32 [rows, tokens] for keys int32 [rows, 2] and token ids int32 [tokens]."""
    bits = _mix(_mix(tokens ^ keys[:, :1]) ^ keys[:, 1:])
    # float64, for 2^32 distinct uniforms: in float32 the largest ones would fall together.
    uniform = (bits.double() + (2.0**31 + 0.5)) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().float()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 on int32, whose products wrap around."""
    x = x ^ _shift(x, 16)
    x = x * 0x7FEB352D
    x = x ^ _shift(x, 15)
    x = x * -2073254261  # 0x846CA68B as a signed word
    return x ^ _shift(x, 16)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right; torch's own keeps the sign."""
    return (x >> bits) & _SHIFT_MASKS[bits]
