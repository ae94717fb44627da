"""Rotary tables against transformers', for every kind of scaling and the parameters that checkpoints set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lepton_dist.errors import CheckpointError
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.registry import read_model
from lepton_dist.model.rope import RopeTables

HEAD_DIM, MAX_POSITIONS = 24, 512
SHORT = [1.0 + 0.05 * index for index in range(HEAD_DIM // 2)]
LONG = [1.5 + 0.4 * index for index in range(HEAD_DIM // 2)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SCALINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {"rope_type": "default"},
    "theta": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3 narrow": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 3.0, "rope_theta": 5e5},
    "yarn": YARN,
    "yarn betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn attention factor": {**YARN, "attention_factor": 1.25},
    "yarn mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn not truncated": {**YARN, "truncate": False},
    "yarn of a small theta": {**YARN, "rope_theta": 100.0},
    "longrope": LONGROPE,
    "longrope factor": {**LONGROPE, "factor": 3.0},
    "longrope attention factor": {**LONGROPE, "attention_factor": 1.5},
}


def written(folder: Path, rope: Mapping[str, Any]) -> tuple[LlamaConfig, ModelConfig]:
    """transformers' configuration, and ours read from what it saves."""
    theirs = LlamaConfig(
        hidden_size=48,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_theta": 10000.0, **rope},
    )
    theirs.save_pretrained(folder)
    return theirs, read_model(folder)[0]


def tables(config: ModelConfig) -> RopeTables:
    assert config.rope is not None
    return RopeTables(config.rope, config.max_positions)


def rewritten(folder: Path, **changes: Any) -> ModelConfig:
    """The configuration after changes to its file; None takes a key out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return read_model(folder)[0]


SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}


def test_rope_scaling_goes_over_rope_parameters(tmp_path: Path) -> None:
    written(tmp_path, {"rope_type": "default"})
    ours = rewritten(tmp_path, rope_scaling=SCALING)
    theirs = LlamaConfig.from_pretrained(tmp_path)
    assert ours.rope is not None
    assert (ours.rope.kind, ours.rope.theta) == (
        theirs.rope_parameters["rope_type"],
        theirs.rope_parameters["rope_theta"],
    )
    cos, _ = LlamaRotaryEmbedding(theirs)(torch.zeros(1, 9, 1), torch.arange(9).unsqueeze(0))
    assert torch.allclose(tables(ours).cos[:9], cos[0, :, : HEAD_DIM // 2], atol=1e-6, rtol=0)
    # Without a theta of its own transformers would take the default over the other one's: neither is silently right.
    theta = {"rope_type": "default", "rope_theta": 5e5}
    bare = {name: value for name, value in SCALING.items() if name != "rope_theta"}
    with pytest.raises(
        CheckpointError, match=r"rope_scaling: overrides rope_parameters.* would be 10000 instead of 500000"
    ):
        rewritten(tmp_path, rope_parameters=theta, rope_scaling=bare)
    assert rewritten(tmp_path, rope_theta=5e5).rope == ours.rope
    assert rewritten(tmp_path, rope_scaling={}).rope == rewritten(tmp_path, rope_scaling=None).rope
    # What stands beside the parameters overrides the one among them.
    scaled = rewritten(tmp_path, rope_scaling=SCALING, original_max_position_embeddings=128).rope
    theirs = LlamaConfig.from_pretrained(tmp_path)
    assert scaled is not None
    assert scaled.parameters["original_max_position_embeddings"] == 128
    LlamaRotaryEmbedding(theirs)  # which looks at it
    assert theirs.rope_parameters["original_max_position_embeddings"] == 128


def test_contexts_are_scaled(tmp_path: Path) -> None:
    def context(**rope: Any) -> int:
        return written(tmp_path, rope)[1].max_positions

    assert context(rope_type="default") == MAX_POSITIONS
    assert context(rope_type="linear", factor=2.5) == 1280
    assert context(rope_type="yarn", factor=16.0, original_max_position_embeddings=64) == 1024
    assert context(rope_type="yarn", factor=2.0, original_max_position_embeddings=64) == MAX_POSITIONS
    assert context(rope_type="yarn", factor=4.0) == 4 * MAX_POSITIONS
    assert context(**LLAMA3) == context(**LONGROPE) == context(rope_type="dynamic", factor=4.0) == MAX_POSITIONS


def test_tables_are_as_long_as_they_are_asked_for(tmp_path: Path) -> None:
    for rope in (LONGROPE, YARN, {"rope_type": "linear", "factor": 2.0}):
        _, ours = written(tmp_path, rope)
        assert ours.rope is not None
        whole, short = tables(ours), RopeTables(ours.rope, 9)
        assert torch.equal(short.cos, whole.cos[:9]) and torch.equal(short.sin, whole.sin[:9])


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = written(tmp_path, SCALINGS[name])
    embedding = LlamaRotaryEmbedding(theirs)
    for length in (1, 64, 65, 130, MAX_POSITIONS):
        positions = torch.arange(length)
        cos, sin = embedding(torch.zeros(1, length, 1), positions.unsqueeze(0))
        is_long = torch.full((length,), length > 64) if ours.long_after is not None else None
        found = tables(ours).rows(positions, is_long)
        for one, other in zip(found, (cos, sin), strict=True):
            # transformers repeats the table for both halves of a head. Angles reach 512 rad, of which float32 keeps
            # 3e-5; both compute them alike, so only the last bits of a frequency may differ.
            expected = other[0, :, : HEAD_DIM // 2].unsqueeze(1)
            assert torch.allclose(one, expected, atol=6e-5, rtol=0), (one - expected).abs().max()


def test_longrope_by_sequence_and_by_position(tmp_path: Path) -> None:
    """A long prompt is long from its first token; a short one's output becomes long beyond the original context."""
    _, ours = written(tmp_path, LONGROPE)
    assert ours.long_after == 64
    rope = tables(ours)
    positions = torch.tensor([3, 3, 63, 64])
    cos, _ = rope.rows(positions, torch.tensor([True, False, False, False]))
    assert torch.equal(cos[:, 0], torch.stack((rope.long_cos[3], rope.cos[3], rope.cos[63], rope.long_cos[64])))


def test_the_older_spelling(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` beside the other keys, with `type` for `rope_type`."""
    _, new = written(tmp_path, {**LLAMA3, "rope_theta": 5e5})
    values = json.loads((tmp_path / "config.json").read_text())
    parameters = values.pop("rope_parameters")
    values["rope_theta"] = parameters.pop("rope_theta")
    values["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    (tmp_path / "config.json").write_text(json.dumps(values))
    old = read_model(tmp_path)[0]
    assert torch.equal(tables(old).cos, tables(new).cos)


def test_only_a_part_of_each_head_may_turn(tmp_path: Path) -> None:
    _, ours = written(tmp_path, {"rope_type": "default", "partial_rotary_factor": 0.5})
    assert tables(ours).cos.shape == (MAX_POSITIONS, HEAD_DIM // 4)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "spiral"}, "'spiral' is not supported; known: default, linear"),
        ({"rope_type": "linear"}, "rope_parameters.factor: is missing"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_parameters.low_freq_factor: is missing"),
        ({**LONGROPE, "long_factor": None}, "rope_parameters.long_factor: is missing"),
        ({**LONGROPE, "short_factor": [1.0]}, "short_factor: must be a list of 12 numbers, not 1 entries"),
        ({**LONGROPE, "long_factor": [1.0] * 11 + ["x"]}, "long_factor.11: must be a number, not 'x'"),
        ({"rope_type": []}, r"rope_type: \[\] is not supported"),
        ({"rope_type": "linear", "factor": 0}, "factor: must be a number above 0"),
        ({"rope_type": "linear", "factor": "x"}, "factor: must be a number, not 'x'"),
        ({"rope_type": "default", "rope_theta": "abc"}, "rope_theta: must be a number, not 'abc'"),
        ({"rope_type": "default", "rope_theta": float("nan")}, "rope_theta: must be a number above 0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.13}, "leaves 3 of 24 numbers"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor: 4 is high_freq_factor, too"),
        ({**YARN, "rope_theta": 1.0}, "rope_theta: 1 makes every frequency the same"),
        ({**YARN, "original_max_position_embeddings": 1}, "original_max_position_embeddings: must be a whole number"),
        ({"full_attention": {"rope_type": "yarn"}}, "settings for each kind of layer are not supported"),
    ],
    ids=str,
)
def test_parameters_that_are_wrong(rope: Mapping[str, Any], words: str, tmp_path: Path) -> None:
    written(tmp_path, {"rope_type": "default"})
    values = json.loads((tmp_path / "config.json").read_text())
    values["rope_parameters"] = rope
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=words):
        tables(read_model(tmp_path)[0])
