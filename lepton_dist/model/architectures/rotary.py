"""Rotary settings out of a config.json: which source counts, and that tables can be made of the parameters."""

from __future__ import annotations

import reprlib
from typing import Any

from lepton_dist.model.config import ROPE_KINDS, RopeConfig
from lepton_dist.model.fields import ConfigFields

_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"
_BY_LAYER = ("full_attention", "sliding_attention")


def read_rope(fields: ConfigFields, head_dim: int, positions: int) -> RopeConfig:
    """Rotary settings from `rope_scaling`, or else `rope_parameters`, and `rope_theta`, as transformers 5 takes them.

    Raises:
        CheckpointError: a parameter is missing or of no use, or the two sources disagree on theta.
    """
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    source = scaling or parameters or ConfigFields(fields.path, {}, "rope_parameters.")
    kind = source.get("rope_type", source.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise source.error("rope_type", f"{reprlib.repr(kind)} is not supported; known: {', '.join(ROPE_KINDS)}")
    if any(name in source.values for name in _BY_LAYER):
        raise source.error(_BY_LAYER[0], "settings for each kind of layer are not supported")
    theta = source.number("rope_theta", fields.number("rope_theta", _THETA, above=0.0), above=0.0)
    if scaling is not None and parameters is not None and source.get("rope_theta") is None:
        other = parameters.number("rope_theta", theta)
        if other != theta:
            raise fields.error(
                "rope_scaling",
                f"overrides rope_parameters, but has no rope_theta: it would be {theta:g} instead of {other:g}; write "
                "rope_theta into rope_scaling",
            )
    partial = source.number(
        "partial_rotary_factor", fields.number("partial_rotary_factor", 1.0, above=0.0, most=1.0), above=0.0, most=1.0
    )
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2:
        raise source.error("partial_rotary_factor", f"leaves {dim} of {head_dim} numbers of a head to turn, not pairs")
    return RopeConfig(theta, dim, positions, kind, _parameters(fields, source, kind, theta, dim, positions))


def _parameters(
    fields: ConfigFields, source: ConfigFields, kind: str, theta: float, dim: int, positions: int
) -> dict[str, Any]:
    """The parameters of a kind of scaling, checked."""
    if kind in ("linear", "dynamic"):
        return _numbers(source, "factor")
    if kind not in ("llama3", "yarn", "longrope"):
        return {}
    # Where the configuration itself has it, as Phi-3's do, that counts.
    place = fields if fields.get(_ORIGINAL) is not None else source
    original = place.integer(_ORIGINAL, positions, least=2)
    found: dict[str, Any] = {_ORIGINAL: original}
    if kind == "llama3":
        found |= _numbers(source, "factor", "low_freq_factor", "high_freq_factor")
        if found["low_freq_factor"] == found["high_freq_factor"]:
            raise source.error("low_freq_factor", f"{found['low_freq_factor']:g} is high_freq_factor, too")
        return found
    found["factor"] = source.number("factor", positions / original, above=0.0, most=1e9)
    if source.get("attention_factor") is not None:
        found |= _numbers(source, "attention_factor")
    if kind == "longrope":
        return found | {key: source.numbers(key, dim // 2, above=0.0) for key in ("short_factor", "long_factor")}
    if theta == 1.0:
        raise source.error("rope_theta", "1 makes every frequency the same")
    for key, default in (("mscale", 0.0), ("mscale_all_dim", 0.0), ("beta_fast", 32.0), ("beta_slow", 1.0)):
        found[key] = source.number(key, default, above=-1e-9, most=1e9) or default
    return found | {"truncate": source.flag("truncate", True)}


def _numbers(source: ConfigFields, *keys: str) -> dict[str, float]:
    return {key: source.number(key, above=0.0, most=1e9) for key in keys}
