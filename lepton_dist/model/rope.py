"""Rotary tables with the scalings of Llama-type checkpoints: default, linear, dynamic, llama3, yarn, longrope.

Follows: linear (arXiv:2306.15595), yarn (arXiv:2309.00071), longrope (arXiv:2402.13753), llama3 (the Llama 3.1
reference code). `dynamic` changes nothing up to `max_position_embeddings`, which is where our contexts end.
"""

from __future__ import annotations

import math

import torch

from lepton_dist.model.config import RopeConfig


class RopeTables:
    """cos and sin of positions: float32 [positions, dim / 2], and a second pair for long contexts (longrope)."""

    def __init__(self, rope: RopeConfig, positions: int, device: torch.device | None = None) -> None:
        # Made on the CPU, so that they are the same on every device.
        self.cos, self.sin = (table.to(device) for table in _table(rope, positions, is_long=False))
        self.has_long = rope.kind == "longrope"
        if self.has_long:
            self._long_after = int(rope.parameters["original_max_position_embeddings"])
            self.long_cos, self.long_sin = (table.to(device) for table in _table(rope, positions, is_long=True))

    def rows(self, positions: torch.Tensor, is_long: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each token: [tokens, 1, dim / 2].

        `is_long` bool [tokens] picks the long table, None never. Tokens generated beyond the original context take
        the long table too; the keys before them stay as they are, as in transformers' generate().
        """
        cos, sin = self.cos[positions], self.sin[positions]
        if is_long is not None:
            chosen = (is_long | (positions >= self._long_after)).unsqueeze(1)
            cos = torch.where(chosen, self.long_cos[positions], cos)
            sin = torch.where(chosen, self.long_sin[positions], sin)
        return cos.unsqueeze(1), sin.unsqueeze(1)


def _table(rope: RopeConfig, positions: int, *, is_long: bool) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies, scale = inverse_frequencies(rope, is_long=is_long)
    angles = torch.arange(positions, dtype=torch.float32).unsqueeze(1) * frequencies
    return angles.cos() * scale, angles.sin() * scale


def inverse_frequencies(rope: RopeConfig, *, is_long: bool) -> tuple[torch.Tensor, float]:
    """Inverse frequencies float32 [dim / 2] and the factor on cos and sin."""
    base = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim)
    if rope.kind == "linear":
        return base / float(rope.parameters["factor"]), 1.0
    if rope.kind == "llama3":
        return _llama3(base, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(base, rope)
    if rope.kind == "longrope":
        return _longrope(base, rope, is_long)
    return base, 1.0


def _llama3(base: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    parameters = rope.parameters
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    original = float(parameters["original_max_position_embeddings"])
    wavelength = 2 * math.pi / base
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * base / factor + smooth * base
    result = torch.where(wavelength > original / low, base / factor, base)
    is_medium = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(is_medium, blended, result)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(base: torch.Tensor, rope: RopeConfig) -> tuple[torch.Tensor, float]:
    parameters = rope.parameters
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    attention = parameters.get("attention_factor")
    if attention is None:
        weight, weight_all = parameters["mscale"], parameters["mscale_all_dim"]
        attention = _mscale(factor, weight) / _mscale(factor, weight_all) if weight and weight_all else _mscale(factor)

    def dim_of(rotations: float) -> float:
        return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(parameters["beta_fast"]), dim_of(parameters["beta_slow"])
    if parameters["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return base / factor * ramp + base * (1 - ramp), float(attention)


def _longrope(base: torch.Tensor, rope: RopeConfig, is_long: bool) -> tuple[torch.Tensor, float]:
    parameters = rope.parameters
    factors = torch.tensor(parameters["long_factor" if is_long else "short_factor"], dtype=torch.float32)
    factor, attention = parameters["factor"], parameters.get("attention_factor")
    if attention is None:
        original = parameters["original_max_position_embeddings"]
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return base / factors, float(attention)
