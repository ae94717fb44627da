"""Which dtypes a run uses, from the plan, the option that overrides it, and the checkpoint. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from lepton_dist.errors import UsageError
from lepton_dist.plan.plan import Precision
from lepton_dist.values import checked_dtype

INT4_GROUPS = {"int4": 32, "int4-64": 64, "int4-128": 128}
"""Neighbouring inputs that share a scale, by kind of 4-bit weights."""

QUANTIZED = ("int8", *INT4_GROUPS)
"""Kinds of weights that are rounded while they are loaded."""


@dataclass(frozen=True)
class Dtypes:
    """Names of dtypes, all decided; `notice` tells the user of one that was replaced.

    `weights` may be quantised (`QUANTIZED`); `compute` is then the float dtype of the embedding and of the activations,
    else it is `weights`.
    """

    weights: str
    kv_cache: str
    wire: str
    compute: str
    notice: str = ""


def decide_dtypes(precision: Precision, override: str | None, checkpoint: str, *, has_float16: bool = False) -> Dtypes:
    """`override` sets all; else the plan, then the checkpoint (weights, compute) and compute (KV cache and wire).

    CPUs have no fast float16 matmul in torch, so float16 is held and computed in float32, unless `has_float16`: every
    stage of the plan is on GPUs.

    Raises:
        UsageError: `override` is no float dtype: a kind of rounded weights would set KV cache and wire too.
    """
    if override is not None:
        try:
            checked_dtype(override)
        except ValueError as error:
            raise UsageError(str(error)) from None
    weights = override or precision.weights or checkpoint
    compute = checkpoint if weights in QUANTIZED else weights
    kv_cache = override or precision.kv_cache or compute
    wire = override or precision.wire or compute
    names = (weights, kv_cache, wire, compute)
    if "float16" not in names or has_float16:
        return Dtypes(*names)
    weights, kv_cache, wire, compute = ("float32" if name == "float16" else name for name in names)
    notice = "float16 is computed in float32 unless every stage is `device: cuda` (bfloat16 would take half the memory)"
    return Dtypes(weights, kv_cache, wire, compute, notice)
