"""Autograd: kernels without a backward leave what needs a gradient to torch, or refuse it; none is lost in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lepton_dist.errors import GradientError
from lepton_dist.kernels.activations import ACTIVATIONS, gated
from lepton_dist.kernels.attention import paged_attention
from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.linear import DenseWeight, make_weight
from lepton_dist.kernels.norms import add_rms_norm, rms_norm
from lepton_dist.kernels.quantized import RoundedWeight
from lepton_dist.kernels.rope import rotate
from lepton_dist.kernels.row_maxima import row_maxima
from tests.plain_torch import plain_torch
from tests.unit.kernels.paged import random_batch
from tests.unit.kernels.test_matmul import needs_panels
from tests.unit.model.layer import HIDDEN, layer

keys, values, batch = random_batch([(1, 30), (5, 40)], 2, 32, 16, torch.float32)
WEIGHT, ANGLES = torch.rand(64) + 0.5, torch.rand(6, 1, 8)
OPERATIONS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "norm": ((6, 64), lambda x: rms_norm(x, WEIGHT, 1e-5, torch.float32)),
    "norm of a sum": ((6, 64), lambda x: add_rms_norm(x * 1, x * 2, WEIGHT, 1e-5, torch.float32)),
    "weight of a norm": ((64,), lambda x: rms_norm(torch.ones(3, 64), x, 1e-5, torch.float32)),
    **{name: ((6, 64), lambda x, name=name: gated(x, ACTIVATIONS[name])) for name in ACTIVATIONS},
    "rope": ((6, 4, 16), lambda x: rotate(x * 1, ANGLES.cos(), ANGLES.sin())),
    "attention": ((6, 4, 32), lambda x: paged_attention(x, keys, values, batch, None)),
    "largest": ((6, 64), lambda x: row_maxima(x)[0]),
    "plain product": ((9, 64), DenseWeight(torch.randn(32, 64)).matmul),
    "rounded product": ((9, 64), RoundedWeight(torch.randn(32, 64), "int8").matmul),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_gradients_are_torchs_own(name: str) -> None:
    shape, operation = OPERATIONS[name]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x, other = start.clone().requires_grad_(), start.clone().requires_grad_()
    y = operation(x)
    with plain_torch():
        wanted = operation(other)
    assert torch.allclose(y, wanted, atol=1e-5)
    for result in (y, wanted):
        result.square().sum().backward()
    assert x.grad is not None and other.grad is not None and torch.allclose(x.grad, other.grad, atol=1e-4)
    assert x.grad.abs().max() > 0
    with torch.no_grad():
        assert not operation(x.detach()).requires_grad


@needs_panels
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_packed_weights_say_that_they_have_none(kind: str) -> None:
    form, x = PanelWeight.of(torch.randn(32, 64).bfloat16(), kind), torch.randn(3, 64, requires_grad=True)
    with pytest.raises(GradientError, match="DenseWeight"):
        form.matmul(x)
    with torch.no_grad():
        form.matmul(x)
    packed = make_weight(torch.randn(32, 64).bfloat16())
    if not isinstance(packed, DenseWeight):
        with pytest.raises(GradientError):
            packed.matmul(torch.randn(3, 64).bfloat16().requires_grad_())


@needs_panels
def test_a_layer_in_two_calls_says_that_it_has_none() -> None:
    made = layer("bfloat16", torch.bfloat16)
    assert made.native is not None
    with pytest.raises(TypeError, match="native"):
        made.native.mlp(torch.randn(3, HIDDEN, requires_grad=True), torch.randn(3, HIDDEN).bfloat16())
