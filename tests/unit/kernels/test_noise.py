"""The noise of sampling: a pure function of (seed, sample, position, token), and Gumbel distributed."""

from __future__ import annotations

import math

import numpy as np
import torch

from lepton_dist.kernels.noise import gumbel, noise_key


def lowbias32(x: int) -> int:
    """The 32-bit finaliser by its published definition."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def test_the_hash_is_the_published_one() -> None:
    tokens = [0, 1, 2, 331, 2**20, 2**31 - 1]
    for seed in (0, 7, -1, 2**63, 2**64 - 1):
        key = noise_key(seed, 3, 99)
        found = gumbel(torch.tensor([key], dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32))[0]
        for token, value in zip(tokens, found.tolist(), strict=True):
            bits = lowbias32(lowbias32(token ^ key[0] & 0xFFFFFFFF) ^ key[1] & 0xFFFFFFFF)
            # The program adds 2^31 to the signed word: the halves of the unsigned range change places.
            uniform = ((bits ^ 0x80000000) + 0.5) / 2**32
            assert math.isclose(value, -math.log(-math.log(uniform)), rel_tol=1e-6, abs_tol=1e-6)


def test_keys_differ_in_everything_that_names_a_draw() -> None:
    keys = {noise_key(seed, sample, position) for seed in range(-5, 5) for sample in range(8) for position in range(50)}
    assert len(keys) == 10 * 8 * 50
    assert noise_key(-1, 0, 0) == noise_key(2**64 - 1, 0, 0)  # the same 64 bits


def test_a_shard_has_the_noise_of_the_whole() -> None:
    keys = torch.tensor([noise_key(1, 0, 5), noise_key(2, 0, 5)], dtype=torch.int32)
    whole = gumbel(keys, torch.arange(331, dtype=torch.int32))
    assert torch.equal(whole[:, 100:200], gumbel(keys, torch.arange(100, 200, dtype=torch.int32)))
    assert torch.equal(whole[1:], gumbel(keys[1:], torch.arange(331, dtype=torch.int32)))


def test_it_is_gumbel_distributed_and_independent_across_tokens_and_positions() -> None:
    keys = torch.tensor([noise_key(11, 0, position) for position in range(400)], dtype=torch.int32)
    noise = gumbel(keys, torch.arange(500, dtype=torch.int32)).double().numpy()
    assert np.isfinite(noise).all()
    levels = np.exp(-np.exp(-noise))  # uniform, if the noise is Gumbel's
    count = levels.size
    for part in np.linspace(0.05, 0.95, 19):
        assert abs((levels < part).mean() - part) < 4.5 * math.sqrt(part * (1 - part) / count)
    for one, other in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:])):
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(one.size)
