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


CALLS = """{% for m in messages %}[{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}]{{ m.content }}
{%- if 'tool_calls' in m %}{% for call in m.tool_calls %}{{ call.function.name }}
{%- for name, value in call.function.arguments.items() %} {{ name }}={{ value | tojson }}{% endfor %}
{%- endfor %}{% endif %}
{%- if m.reasoning_content is defined %}<{{ m.reasoning_content }}>{% endif %}{% endfor %}"""


def call(arguments: object) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}


def test_messages_of_openai_s_clients(model: Path) -> None:
    """Null keys, arguments as strings, parts: as transformers renders what they mean."""
    from transformers import AutoTokenizer

    user = {"role": "user", "content": "q"}
    sdk = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "tool_calls": None,
        "function_call": None,
        "name": None,
    }
    chats: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
        ([user, sdk], [user, sdk]),
        ([user, {**sdk, "tool_calls": []}], [user, sdk]),
        (
            [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [call('{"city": "Köln", "n": [2, null]}'), call("")],
                }
            ],
            [{"role": "assistant", "tool_calls": [call({"city": "Köln", "n": [2, None]}), call({})]}],
        ),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [call(None), call({"a": 1})]}],
            [{"role": "assistant", "content": "x", "tool_calls": [call({}), call({"a": 1})]}],
        ),
        (
            [{"role": "assistant", "content": "x", "reasoning": "r"}],
            [{"role": "assistant", "content": "x", "reasoning": "r"}],
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], [{"role": "user", "content": "a\nb"}]),
    ]
    configured(model, chat_template=CALLS)
    ours, theirs = Tokenizer.load(model), AutoTokenizer.from_pretrained(model)
    for sent, meant in chats:
        before = json.dumps(sent)
        assert ours.render_chat(sent) == theirs.apply_chat_template(meant, tokenize=False)
        assert json.dumps(sent) == before
    plain = Tokenizer.load(configured(model, chat_template="{{ messages[0].tool_calls[0].function.arguments }}"))
    for text in ("{torn", "5", '"s"', "1" * 6000, "[" * 100_000):
        assert plain.render_chat([{"role": "assistant", "tool_calls": [call(text)]}]) == text


@pytest.mark.parametrize(
    "loop",
    [
        "{% for part in m['content'] %}<{{ part.text }}>{% endfor %}",
        "{% set c = m.content %}{% for part in c %}<{{ part.text }}>{% endfor %}",
    ],
)
def test_a_template_that_goes_through_parts_gets_them(loop: str, model: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        + loop
        + "{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    tokenizer = Tokenizer.load(configured(model, chat_template=source))
    chat = [{"role": "user", "content": parts}, {"role": "user", "content": "c"}]
    assert tokenizer.render_chat(chat) == "<a><b>c"


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


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece", "words"])
def test_a_text_far_beyond_the_context_is_refused_by_its_beginning(
    kind: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[kind]
    endless = "again and the quick " * 200_000
    with pytest.raises(RequestError, match=r"the first \d+ of the prompt's 4000000 characters") as refused:
        tokenizer.encode(endless, most=500)
    assert refused.value.kind == "context_length_exceeded"
    row = PromptRow(key="i:1", id=1, line=1, prompt=endless)
    maker = RequestMaker(tokenizer, {}, {}, vocab=999, context_tokens=500, base_seed=0)
    with pytest.raises(RequestError, match="the context holds 500"):
        maker.request(row)
    # Characters alone refuse nothing, and what is a little too long is counted whole.
    assert len(tokenizer.encode("?" * 9000 if kind == "words" else "again and" * 1000, most=100_000)) < 100_000
    assert len(tokenizer.encode("again and " * 190, most=300)) > 300


def test_an_id_beyond_the_vocabulary_is_told_as_what_it_is(all_tokenizers: dict[str, Tokenizer]) -> None:
    maker = RequestMaker(all_tokenizers["byte_level"], {}, {}, vocab=3, context_tokens=500, base_seed=0)
    with pytest.raises(RequestError, match=r"^the tokenizer makes of the prompt \d+; .* from 0 to 2"):
        maker.request(PromptRow(key="i:1", id=1, line=1, prompt="again"))
    with pytest.raises(RequestError, match=r"^prompt_token_ids holds 3; "):
        maker.request(PromptRow(key="i:1", id=1, line=1, prompt_token_ids=[3]))


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
