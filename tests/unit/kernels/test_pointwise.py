"""The compiled norms, rope and gating against the torch path, which the model tests check."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lepton_dist.kernels.activations import gated
from lepton_dist.kernels.norms import add_rms_norm, rms_norm
from lepton_dist.kernels.rope import rotate
from tests.plain_torch import plain_torch

# float32: some roundings of values of size 1. bfloat16: both round the same float32 value, give or take its last bit.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 100), (200, 130)])


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    most = TOLERANCE[wanted.dtype]
    return torch.allclose(found.double(), wanted.double(), rtol=most, atol=most)


@DTYPES
@SHAPES
def test_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, delta, weight = torch.randn(shape) * 3, torch.randn(shape).to(dtype), torch.rand(shape[1])
    sums = hidden.clone(), hidden.clone()
    found = rms_norm(hidden, weight, 1e-5, dtype), add_rms_norm(sums[0], delta, weight, 1e-5, dtype)
    with plain_torch():
        wanted = rms_norm(hidden, weight, 1e-5, dtype), add_rms_norm(sums[1], delta, weight, 1e-5, dtype)
    assert close(found[0], wanted[0]) and close(found[1], wanted[1])
    assert torch.equal(*sums)


@DTYPES
@SHAPES
def test_gating(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape[0], 2 * shape[1]) * 10).to(dtype)
    x[0, 0] = -200  # e^200 is beyond float32
    found = gated(x, functional.silu)
    with plain_torch():
        wanted = gated(x.float(), functional.silu).to(dtype)
    assert close(found, wanted)


@DTYPES
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (6, 3), (80, 16)])
def test_rope_on_a_part_of_a_wider_tensor(dim: int, half: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.randn(7, 9, dim).to(dtype)
    angles = torch.rand(7, 1, half) * 6
    before, x = wide.clone(), wide[:, :6]
    with plain_torch():
        wanted = rotate(x, angles.cos(), angles.sin())
    found = rotate(x, angles.cos(), angles.sin())
    assert close(found, wanted)
    assert torch.equal(wide[:, 6:], before[:, 6:])
