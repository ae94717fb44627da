"""Token ids are those of transformers' own tokenizer for a directory, whatever kinds of files lie in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_dist.errors import CheckpointError
from lepton_dist.text.detokenizer import StopScanner
from lepton_dist.text.tokenizer import Tokenizer
from tests.checkpoints import write_sentencepiece

Backends = dict[str, Callable[[], tokenizers.Tokenizer]]

TEXTS = [
    "The quick brown  fox\njumps",
    " again",
    "<s>again</s> and</s>again",
    "Grüße 世界 😀 don't 1234",
    "x<|im_start|>again <|im_start|> and<new>y <extra>",
    "",
]
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def written(directory: Path, kind: str, backends: Backends, model_type: str, config: dict[str, Any]) -> Path:
    directory.mkdir()
    if kind in ("prepend", "metaspace bpe"):
        write_sentencepiece(directory, ["▁the", "▁again", "▁and", "▁quick"], kind.split()[0])
    else:
        backends[kind]().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory


def assert_same_ids(directory: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    return ours


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    "kind", ["prepend", "metaspace bpe", "byte_level", "sentence_piece", "metaspace", "word_pieces", "words"]
)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_every_kind_in_every_family(kind: str, model_type: str, tmp_path: Path, backends: Backends) -> None:
    classes = {
        "llama": ["PreTrainedTokenizerFast", "LlamaTokenizerFast"],
        "mistral": ["LlamaTokenizer"],
        "qwen2": ["Qwen2Tokenizer", "LlamaTokenizerFast"],
        "qwen3": ["Qwen2Tokenizer", "PreTrainedTokenizerFast"],
        "gpt2": ["GPT2Tokenizer", "PreTrainedTokenizerFast"],
    }[model_type]
    is_bpe = kind in ("prepend", "metaspace bpe", "byte_level", "sentence_piece")
    for number, name in enumerate(classes):
        directory = written(tmp_path / str(number), kind, backends, model_type, NAMES | {"tokenizer_class": name})
        is_plain = name == "PreTrainedTokenizerFast" or model_type == "mistral"
        if is_bpe or is_plain:
            assert_same_ids(directory)
        else:  # transformers makes something else of it, or fails; the file is followed, and the user told
            assert "followed as it stands" in Tokenizer.load(directory).notice


@pytest.mark.parametrize("kind", ["prepend", "metaspace bpe"])
@pytest.mark.parametrize(
    "config",
    [
        {"legacy": False},
        {"legacy": True},
        {"add_prefix_space": False},
        {"add_prefix_space": True, "legacy": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"split_special_tokens": True},
        {"bos_token": None, "pad_token": "<pad>"},
        {"tokenizer_class": "LlamaTokenizerFast", "unk_token": {"__type": "AddedToken", "content": "<unk>", **FLAGS}},
    ],
)
def test_llama_s_own_way(kind: str, config: dict[str, Any], tmp_path: Path, backends: Backends) -> None:
    settings = NAMES | {"tokenizer_class": "LlamaTokenizer"} | config
    assert_same_ids(written(tmp_path / "m", kind, backends, "llama", settings))


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    "place",
    ["decoder", "decoder flags", "decoder over file", "file", "map", "named", "extra", "additional", "model's own"],
)
def test_added_tokens_wherever_they_stand(place: str, name: str, tmp_path: Path, backends: Backends) -> None:
    directory = written(tmp_path / "m", "prepend", backends, "llama", NAMES | {"tokenizer_class": name})
    path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    content, config = json.loads(path.read_text()), json.loads(config_path.read_text())
    size = len(content["model"]["vocab"])
    old = {str(token["id"]): {key: token[key] for key in ("content", *FLAGS)} for token in content["added_tokens"]}
    start = {"content": "<|im_start|>", **FLAGS}
    if place == "decoder":
        config["added_tokens_decoder"] = old | {
            str(size + 1): start,
            str(size): start | {"content": "<new>", "special": False},
        }
    if place == "decoder flags":
        content["added_tokens"].append({"id": size, **start, "special": False})
        config["added_tokens_decoder"] = old | {str(size): start}
    if place == "decoder over file":  # the file's are not in it, and one is no longer special
        content["added_tokens"].append({"id": size, **start})
        config["added_tokens_decoder"] = {str(size): start | {"special": False, "lstrip": True}}
    if place in ("file", "map"):
        (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<new>": size + 1}))
    if place == "map":
        named = {"eos_token": start, "additional_special_tokens": ["<new>", "<extra>"]}
        (directory / "special_tokens_map.json").write_text(json.dumps(named))
    if place == "named":
        config |= {
            "pad_token": "<|im_start|>",
            "mask_token": {"__type": "AddedToken", **start, "content": "<new>", "lstrip": True},
        }
    if place == "extra":
        config["extra_special_tokens"] = ["<|im_start|>", "<new>", "<extra>"]
    if place == "additional":
        config["additional_special_tokens"] = ["<|im_start|>", "<new>"]
    if place == "model's own":
        config |= {"image_token": "<|im_start|>", "extra_special_tokens": {"video_token": "<new>"}}
    path.write_text(json.dumps(content))
    config_path.write_text(json.dumps(config))
    assert_same_ids(directory)


def test_dropout_is_for_training(tmp_path: Path, backends: Backends) -> None:
    directory = written(tmp_path / "m", "byte_level", backends, "llama", {"tokenizer_class": "PreTrainedTokenizerFast"})
    plain = Tokenizer.load(directory).encode(TEXTS[0])
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.9
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(directory).encode(TEXTS[0]) == plain
    assert Tokenizer.load(directory).notice == ""


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder is a list"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder.x"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "<a>"}}, "added_tokens_decoder.5"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": 5}}}, "added_tokens_decoder.5"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {"content": "a", "lstrip": 1}}},
            "added_tokens_decoder.5",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"٥": {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"pad_token": {"content": "a", "lstrip": []}}, "pad_token"),
        ("added_tokens.json", {"<a>": "5"}, "added_tokens.json"),
        ("added_tokens.json", {"<a>": -1}, "added_tokens.json"),
        ("special_tokens_map.json", [], "special_tokens_map.json"),
        ("tokenizer.json", {"model": {}}, "tokenizer.json"),
    ],
)
def test_files_that_are_wrong_are_named(
    file: str, content: Any, words: str, tmp_path: Path, backends: Backends
) -> None:
    directory = written(tmp_path / "m", "byte_level", backends, "llama", {})
    (directory / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=file) as wrong:
        Tokenizer.load(directory)
    assert words in str(wrong.value)


def test_odd_but_harmless_values(tmp_path: Path, backends: Backends) -> None:
    config = {"pad_token": 5, "extra_special_tokens": 7, "additional_special_tokens": [None, 5], "tokenizer_class": []}
    directory = written(tmp_path / "m", "byte_level", backends, "llama", config)
    (directory / "config.json").write_text(json.dumps({"model_type": []}))
    assert Tokenizer.load(directory).encode("again") == Tokenizer(backends["byte_level"](), {}, {}).encode("again")


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from([2**40, 1.5, "", "x", "<s>", "▁", "LlamaTokenizer", "Qwen2Tokenizer", "BPE", "Fuse"]),
    st.lists(st.sampled_from(["<a>", 5, None, {"content": "<b>"}]), max_size=2),
    st.dictionaries(
        st.sampled_from(["type", "content", "special", "5", "x"]), st.sampled_from([5, "y", True]), max_size=2
    ),
)


def changed(data: st.DataObject, value: Any) -> Any:
    """A JSON value with one thing in it replaced, wherever it lies."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 5)):
        key = data.draw(st.sampled_from(sorted(value)))
        return value | {key: changed(data, value[key])}
    if isinstance(value, list) and value and data.draw(st.integers(0, 5)):
        place = data.draw(st.integers(0, min(len(value), 5) - 1))
        return [*value[:place], changed(data, value[place]), *value[place + 1 :]]
    return data.draw(ODD)


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_wrong_in_the_files_is_a_fault_of_the_checkpoint(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, backends: Backends
) -> None:
    directory = tmp_path_factory.mktemp("m") / "m"
    kind = data.draw(st.sampled_from(["prepend", "byte_level"]))
    flags = {"content": "<b>", **FLAGS}
    config = NAMES | {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"3": flags}, "legacy": False}
    written(
        directory,
        kind,
        backends,
        "llama",
        config | {"extra_special_tokens": ["<c>"], "chat_template": "{{ bos_token }}"},
    )
    (directory / "special_tokens_map.json").write_text(json.dumps({"pad_token": flags}))
    (directory / "added_tokens.json").write_text(json.dumps({"<d>": 300}))
    for name in data.draw(
        st.lists(st.sampled_from(sorted(path.name for path in directory.iterdir())), max_size=2, unique=True)
    ):
        path = directory / name
        text = json.dumps(changed(data, json.loads(path.read_text())))
        path.write_text(text[: data.draw(st.integers(0, len(text)))] if data.draw(st.integers(0, 9)) == 0 else text)
    try:
        tokenizer = Tokenizer.load(directory)
        ids = tokenizer.encode("again <b> x")
        StopScanner(tokenizer, ["x"], ids)
    except CheckpointError as error:
        assert len(str(error)) < 2000
        return
    for text in (tokenizer.decode(ids), "".join(map(tokenizer.token_text, ids))):
        assert isinstance(text, str)
