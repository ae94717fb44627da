"""Tokenizers and chat templates: what transformers gives, and clear errors for what cannot be read."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from lepton_dist.errors import CheckpointError, RequestError
from lepton_dist.runtime.requests import RequestMaker
from lepton_dist.text.prompt import prompt_ids
from lepton_dist.text.rows import PromptRow
from lepton_dist.text.tokenizer import Tokenizer

TEMPLATE = """{%- if tools %}{{ tools | tojson }}
{% endif %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Roles must be system, user or assistant') }}
    {% endif %}
    {% if message.content == 'skip' %}{% continue %}{% endif %}
{{ bos_token }}[{{ message.role }}] {{ message['content'] | trim }}
    {% generation %}{{ eos_token }}{% endgeneration %}

{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""
MESSAGES = [
    {"role": "system", "content": " be <brief> & kind "},
    {"role": "user", "content": "skip"},
    {"role": "user", "content": "Grüße\n世界"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ü & <b>"}}]


Backends = dict[str, Callable[[], tokenizers.Tokenizer]]


@pytest.fixture
def model(tmp_path: Path, backends: Backends) -> Path:
    backends["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    return configured(tmp_path)


def configured(directory: Path, **config: Any) -> Path:
    names = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(names | config))
    return directory


def test_encoding_equals_transformers(tmp_path: Path, backends: Backends) -> None:
    from transformers import AutoTokenizer

    backends["sentence_piece"]().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ["The quick  fox", " Grüße\n世界 😀", "</s>x"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ids[0] == ours.bos_token_id == theirs.bos_token_id
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.eos_token_id == theirs.eos_token_id


def test_unknown_ids_decode_to_nothing(all_tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in all_tokenizers.values():
        ids = tokenizer.encode("again and", add_special_tokens=False)
        assert tokenizer.decode([ids[0], 10**6, 2**40, -1, *ids[1:]]) == tokenizer.decode(ids)
        assert tokenizer.token_text(10**6) == ""


def test_token_texts_keep_their_space_and_special_names(all_tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("byte_level", "sentence_piece", "metaspace"):
        tokenizer = all_tokenizers[kind]
        ids = tokenizer.encode("The quick and again", add_special_tokens=False)
        assert "".join(tokenizer.token_text(i) for i in ids).removeprefix(" ") == "The quick and again"
    tokenizer = all_tokenizers["sentence_piece"]
    assert tokenizer.token_text(tokenizer.eos_token_id or 0) == "</s>"
    assert tokenizer.token_bytes(1 + 0xE4) == b"\xe4"
    assert tokenizer.token_text(1 + 0xE4) == "\ufffd"


@pytest.mark.parametrize("place", ["config", "file", "json", "named"])
def test_chat_equals_transformers(model: Path, place: str) -> None:
    from transformers import AutoTokenizer

    if place == "config":
        configured(model, chat_template=TEMPLATE)
    if place == "file":
        (model / "chat_template.jinja").write_text(TEMPLATE)
    if place == "named":
        named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T" + TEMPLATE}]
        configured(model, chat_template=named)
    theirs = AutoTokenizer.from_pretrained(model)
    if place == "json":
        (model / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        theirs.chat_template = TEMPLATE
    ours = Tokenizer.load(model)
    for tools in (None, TOOLS):
        text = theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(MESSAGES, tools) == text
        assert text.endswith("[assistant]")
        row = PromptRow(key="i:1", id=1, line=1, messages=MESSAGES, tools=tools)
        ids = theirs.apply_chat_template(MESSAGES, tools=tools, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert prompt_ids(row, ours) == ids


def test_the_date_of_a_chat_is_the_given_one(model: Path) -> None:
    source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y %H:%M') }}{% endif %}{{ messages[0].content }}"
    assert not Tokenizer.load(model).tells_date
    tokenizer = Tokenizer.load(configured(model, chat_template=source))
    assert tokenizer.tells_date
    first = datetime.datetime(2024, 7, 31, 23, 59)
    assert tokenizer.render_chat(MESSAGES[2:], today=first) == "31 Jul 2024 23:59Grüße\n世界"
    assert tokenizer.render_chat(MESSAGES[2:]).startswith(f"{datetime.datetime.now():%d %b}")
    row = PromptRow(key="i:1", id=1, line=1, messages=MESSAGES[2:])
    maker = RequestMaker(tokenizer, {}, {}, vocab=999, context_tokens=99, base_seed=0, today=first)
    assert tokenizer.decode(maker.request(row).prompt).startswith("31 Jul 2024 23:59")


def test_chats_that_cannot_be_rendered_are_refused_without_their_text(model: Path) -> None:
    plain = Tokenizer.load(model)
    with pytest.raises(RequestError, match="no chat template"):
        plain.render_chat(MESSAGES)
    chat = Tokenizer.load(configured(model, chat_template=TEMPLATE))
    with pytest.raises(RequestError, match="Roles must be system, user or assistant"):
        chat.render_chat([{"role": "secret-role", "content": "x"}])
    loud = Tokenizer.load(configured(model, chat_template="{{ raise_exception('no: ' + messages[0].content) }}"))
    with pytest.raises(RequestError) as refused:
        loud.render_chat([{"role": "user", "content": "my secret"}])
    assert "secret" not in str(refused.value)
    for template in ("{% for %}", "{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}", "{{ 1 + 'a' }}"):
        with pytest.raises(RequestError):
            Tokenizer.load(configured(model, chat_template=template)).render_chat(MESSAGES)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, backends: Backends) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is absent"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a tokenizer"):
        Tokenizer.load(tmp_path)
    backends["byte_level"]().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: must hold a JSON object"):
        Tokenizer.load(tmp_path)


def test_text_that_is_not_unicode_is_refused(all_tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        all_tokenizers["byte_level"].encode("a\ud800b")


def test_limits_of_training_do_not_cut_prompts(all_tokenizers: dict[str, Tokenizer], backends: Backends) -> None:
    backend = backends["byte_level"]()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    text = "again and again and again and again"
    assert Tokenizer(backend, {}, {}).encode(text) == all_tokenizers["byte_level"].encode(text)


def test_rows_of_text_need_a_tokenizer_and_rows_of_ids_do_not() -> None:
    assert prompt_ids(PromptRow(key="i:1", id=1, line=1, prompt_token_ids=[7]), None) == [7]
    with pytest.raises(CheckpointError, match="line 3 holds text"):
        prompt_ids(PromptRow(key="i:1", id=1, line=3, prompt="x"), None)
