"""Which dtypes a run uses, from the plan, the option that overrides it, and the checkpoint. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from lepton_dist.plan.plan import Precision


@dataclass(frozen=True)
class Dtypes:
    """Names of dtypes, all decided; `notice` tells the user of one that was replaced."""

    weights: str
    kv_cache: str
    wire: str
    notice: str = ""


def decide_dtypes(precision: Precision, override: str | None, checkpoint: str) -> Dtypes:
    """`override` sets all three; else the plan, then the checkpoint (weights) and the weights (KV cache and wire).

    CPUs have no fast float16 matmul in torch, so float16 is held and computed in float32 there.
    """
    weights = override or precision.weights or checkpoint
    kv_cache = override or precision.kv_cache or weights
    wire = override or precision.wire or weights
    names = (weights, kv_cache, wire)
    if "float16" not in names:
        return Dtypes(*names)
    weights, kv_cache, wire = ("float32" if name == "float16" else name for name in names)
    return Dtypes(
        weights, kv_cache, wire, notice="float16 is computed in float32 on CPUs (bfloat16 would take half the memory)"
    )
