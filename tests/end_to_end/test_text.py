"""The text of an output continues its prompt's, on every plan and in both dialects, as transformers decodes both."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_chain, write_sentencepiece
from tests.end_to_end.rig import generate, plan, read_rows, write_rows
from tests.harness import run

OPTIONS = ("--temperature", "0", "--threads", "1", "--max-tokens", "8")
WORDS = ("▁the", "▁cat", "▁sat", "▁on", "▁mat")
CHAT = [{"role": "user", "content": "the cat"}]


def openai(key: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": key, "method": "POST", "url": f"/v1/{url}", "body": body}


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [
        ("metaspace", None),
        ("prepend", "pp: 2"),
        pytest.param("prepend", "tp: 2", marks=pytest.mark.slow),
        pytest.param("metaspace", "dp: 2", marks=pytest.mark.slow),
    ],
)
def test_text_continues_the_prompt(scheme: str, mesh: str | None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    template = "{% for m in messages %}{{ bos_token + m.content }}{% endfor %}"
    ids = write_sentencepiece(model, WORDS, scheme, chat_template=template)
    chain = [*(ids[word] for word in ("▁cat", "▁sat", "▁on", "▁the")), ids["<0xE2>"], ids["<0x82>"], ids["<0xAC>"]]
    chain += [ids["▁mat"], ids["</s>"]]
    write_chain(model, len(ids), dict(pairwise(chain)))
    rows = [
        {"id": "text", "prompt": "the cat", "return_token_ids": True, "logprobs": 1, "prompt_logprobs": 0, "n": 2},
        {"id": "stop", "prompt": "the cat", "stop": ["nowhere", " sat"]},
        {"id": "middle", "prompt": "the cat", "stop": ["€ m"]},
        {"id": "ids", "prompt_token_ids": [1, ids["▁cat"]]},
        {"id": "character", "prompt_token_ids": [ids["▁cat"], ids["<0xE2>"], ids["<0x82>"]], "max_tokens": 2},
        {"id": "nothing before", "prompt_token_ids": [1, ids["</s>"]], "stop_token_ids": [0], "max_tokens": 1},
        {"id": "chat", "messages": CHAT},
        openai("completions", "completions", prompt="the cat", logprobs=1),
        openai("messages", "chat/completions", messages=CHAT, logprobs=True, stop=[" the"]),
    ]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    options = [*OPTIONS, "--show", *(() if mesh is None else ("--plan", plan(tmp_path / "plan.yaml", mesh)))]
    job = run(generate(model, source, output, *options), ranks=None if mesh is None else 2)
    assert job.returncode == 0, job.report()
    found = {row.get("custom_id", row["id"]): row for row in read_rows(output)}
    reference = AutoTokenizer.from_pretrained(model)
    prompt = reference("the cat")["input_ids"]
    choices = found["text"]["choices"]
    both = reference.decode([*prompt, *choices[0]["token_ids"]], skip_special_tokens=True)
    expected = both.removeprefix(reference.decode(prompt, skip_special_tokens=True))
    assert expected == " sat on the€ mat"
    assert [choice["text"] for choice in choices] == [expected] * 2
    scored = [next(iter(entry.values()))["decoded_token"] for entry in found["text"]["prompt_logprobs"][1:]]
    assert "".join(scored) == "the cat"
    assert found["stop"]["text"] == ""
    assert found["middle"]["text"] == " sat on the"
    assert found["ids"]["text"] == found["chat"]["text"] == expected
    assert found["character"]["text"] == "€ mat"
    completions, chat = (found[key]["response"]["body"]["choices"][0] for key in ("completions", "messages"))
    assert completions["text"] == expected
    assert "".join(completions["logprobs"]["tokens"][:4]) == " sat on the" + "�"
    assert chat["message"]["content"] == " sat on"
    shown = bytes(value for entry in chat["logprobs"]["content"] for value in entry["bytes"]).decode()
    assert shown == " sat on the"
    assert f"--- text\nthe cat{expected}\n" in job.stdout
