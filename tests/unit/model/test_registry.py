"""Reading config.json: what each family takes from it, and what is said of one that is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_dist.errors import CheckpointError
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.registry import FAMILIES, read_model
from lepton_dist.model.rope import RopeTables

TYPES = [name for family in FAMILIES for name in family.model_types]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 93,
    "vocab_size": 331,
    "max_position_embeddings": 128,
}


def write(folder: Path, **fields: Any) -> Path:
    values = {name: value for name, value in {**LLAMA, **fields}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def read(folder: Path, **fields: Any) -> ModelConfig:
    return read_model(write(folder, **fields))[0]


def test_sizes(tmp_path: Path) -> None:
    shape = read(tmp_path).shape
    assert (shape.num_layers, shape.hidden, shape.num_heads, shape.num_kv_heads) == (3, 48, 6, 2)
    assert (shape.head_dim, shape.ffn, shape.vocab) == (8, 93, 331)
    assert read(tmp_path, head_dim=20).shape.head_dim == 20
    assert read(tmp_path, num_key_value_heads=None).shape.num_kv_heads == 6


def test_biases(tmp_path: Path) -> None:
    assert read(tmp_path).biases == set()
    assert read(tmp_path, attention_bias=True).biases == {"qkv", "attention_output"}
    assert read(tmp_path, attention_bias=True, mlp_bias=True).biases == {"qkv", "attention_output", "mlp"}
    assert read(tmp_path, model_type="qwen2").biases == {"qkv"}
    assert read(tmp_path, model_type="qwen3").biases == set()


def test_windows(tmp_path: Path) -> None:
    def windows(**fields: Any) -> tuple[int | None, ...]:
        return read(tmp_path, **fields).windows

    assert windows(sliding_window=9) == (None,) * 3  # not a field of Llama
    assert windows(model_type="mistral", sliding_window=9) == (9, 9, 9)
    assert windows(model_type="mistral", sliding_window=None) == (None,) * 3
    assert windows(model_type="mistral") == (4096,) * 3
    assert windows(model_type="qwen2", sliding_window=9) == (None,) * 3
    sliding = {"sliding_window": 9, "use_sliding_window": True}
    assert windows(model_type="qwen2", max_window_layers=1, **sliding) == (None, 9, 9)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(model_type="qwen3", layer_types=kinds, **sliding) == (9, None, 9)


def test_end_tokens(tmp_path: Path) -> None:
    assert read(tmp_path).eos_token_ids == (2,)  # a file leaves out what is transformers' default
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()
    assert read(tmp_path, model_type="qwen2").eos_token_ids == ()
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (5, 7)
    for text in ("{}", "", " \n"):
        (tmp_path / "generation_config.json").write_text(text)
        assert read(tmp_path, eos_token_id=3).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id: must be a token id"):
        read(tmp_path)


def test_what_a_file_leaves_out_is_transformers_default(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for family, sizes in (("llama", {}), ("mistral", {"head_dim": 8}), ("qwen2", {}), ("qwen3", {"head_dim": 8})):
        ours = read(tmp_path, model_type=family, max_position_embeddings="absent", **sizes)
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert ours.max_positions == theirs.max_position_embeddings
        assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.is_tied is theirs.tie_word_embeddings
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert read_model(tmp_path)[0].eos_token_ids == (AutoConfig.from_pretrained(tmp_path).eos_token_id,)


KINDS = ["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from([10**9, 10**30, -(10**30), 1e308, -0.0, 0.5, math.nan, math.inf, "", "x", "bfloat16"]),
    st.sampled_from(KINDS),
    st.lists(st.one_of(st.integers(-1, 5), st.text(max_size=2)), max_size=4),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "x"]), st.integers(-1, 5) | st.text(max_size=3)),
)
ROPE_KEYS = [
    *("rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "beta_fast"),
    *("high_freq_factor", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "short_factor"),
    *("long_factor", "partial_rotary_factor"),
]
KEYS = [
    *("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size"),
    *("intermediate_size", "max_position_embeddings", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
    *("dtype", "torch_dtype", "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types", "max_window_layers"),
    *("quantization_config", "n_embd", "n_head", "n_layer", "n_inner", "n_positions", "layer_norm_epsilon"),
    *("activation_function", "scale_attn_weights", "original_max_position_embeddings"),
]


@given(data=st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_is_taken_or_named(data: st.DataObject, tmp_path: Path) -> None:
    """Nothing in a config.json gives another error than that of its file and key, then or when tables are made."""
    values: dict[str, Any] = {**LLAMA, "model_type": data.draw(st.sampled_from([*TYPES, "x"]))}
    if data.draw(st.booleans()):
        kind = data.draw(st.sampled_from(KINDS))
        rope: dict[str, Any] = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
        for key in data.draw(st.lists(st.sampled_from(ROPE_KEYS), max_size=2)):
            rope[key] = data.draw(ODD)
        values[data.draw(st.sampled_from(["rope_parameters", "rope_scaling"]))] = rope
    for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=2)):
        values[key] = data.draw(ODD)
    text = json.dumps(values)
    if data.draw(st.integers(0, 9)) == 0:
        text = text[: data.draw(st.integers(0, len(text)))]
    (tmp_path / "config.json").write_text(text)
    try:
        config, _ = read_model(tmp_path)
    except CheckpointError as error:
        assert str(error).startswith(f"{tmp_path / 'config.json'}: ") and len(str(error)) < 1000
        return
    if config.rope is not None and config.rope.dim < 1000:
        made = RopeTables(config.rope, 4)
        assert torch.isfinite(made.cos).all() and torch.isfinite(made.sin).all()


def test_a_file_that_nests_too_deep(tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        write(tmp_path)
        (tmp_path / name).write_text('{"a":' + "[" * 200_000)
        with pytest.raises(CheckpointError, match=f"{name}: nests too deep"):
            read_model(tmp_path)


def test_dtype_in_both_spellings(tmp_path: Path) -> None:
    assert read(tmp_path).dtype == read(tmp_path, dtype=None).dtype == read(tmp_path, torch_dtype="auto").dtype == ""
    assert read(tmp_path, torch_dtype="torch.bfloat16").dtype == "bfloat16"
    assert read(tmp_path, dtype="bfloat16").dtype == "bfloat16"
    assert read(tmp_path, torch_dtype="float16").dtype == "float16"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, r"model_type: 'mamba' is not supported; known: gpt2, llama, mistral, qwen2, qwen3"),
        ({"model_type": "absent"}, "model_type: None is not supported"),
        ({"hidden_size": "absent"}, "hidden_size: is missing"),
        ({"hidden_size": "48"}, "hidden_size: must be a whole number of at least 1, not '48'"),
        ({"vocab_size": 0}, "vocab_size: must be a whole number of at least 1, not 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be a whole number"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide num_attention_heads 6"),
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"hidden_act": "swiglu"}, "hidden_act: 'swiglu' is not supported; known: silu"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false, not 1"),
        ({"dtype": "int8"}, "dtype: 'int8' is not supported"),
        ({"eos_token_id": "end"}, "eos_token_id: must be a token id"),
        ({"hidden_act": []}, r"hidden_act: \[\] is not supported"),
        ({"model_type": []}, r"model_type: \[\] is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: must be a whole number of at most 16384, not 1000000000"),
        ({"hidden_size": 10**12}, "hidden_size: must be a whole number of at most"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: must be a number above 0"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
            "layer_types: Mistral has",
        ),
        ({"rope_parameters": 3}, "rope_parameters: must be a mapping, not 3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised checkpoints are not supported"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "layer_types: must list the kind of each of the 3",
        ),
        ({"model_type": "qwen2", "layer_types": ["linear"] * 3}, "layer_types: 'linear' is not supported"),
        ({"model_type": "gpt2", "n_embd": 50, "n_head": 12}, "n_embd: 50 is not a multiple of n_head 12"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "true is not supported"),
    ],
    ids=str,
)
def test_mistakes_are_named(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        read(tmp_path, **fields)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_files_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        read_model(tmp_path)
    for text, words in (("{", "is not valid JSON"), ("[]", "must hold a JSON object, not list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_model(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not UTF-8 text"):
        read_model(tmp_path)


def test_no_two_families_claim_one_type() -> None:
    assert len(set(TYPES)) == len(TYPES)
