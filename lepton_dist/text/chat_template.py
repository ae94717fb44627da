"""A checkpoint's chat template, rendered as Hugging Face transformers renders it.

Templates come with checkpoints and are not trusted: they run in jinja2's immutable sandbox and see plain data only.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_dist.checkpoint_files import read_checkpoint_text, read_json_object
from lepton_dist.errors import CheckpointError, RequestError
from lepton_dist.text.messages import messages_for_template

if TYPE_CHECKING:
    import jinja2.nodes

DATE_FUNCTION = "strftime_now"
"""What a template calls to be told the date."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: the jinja2 source.
        special_tokens: names the template may use, such as ``bos_token``, and their text.

    Raises:
        RequestError: the source is not a valid template. It is the requests with messages that fail, not the others.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        import jinja2

        self._source = source
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._takes_parts = _goes_through_parts(environment, source)
        except jinja2.TemplateError as error:
            raise RequestError(f"the model's chat template is not valid jinja2: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        today: datetime.datetime | None = None,
    ) -> str:
        """The text of a chat, up to where the assistant's answer begins.

        Args:
            today: the moment that the template is told when it asks for the date; None is now. A run that can be
                resumed gives its first start, so that its prompts do not change at midnight.

        Raises:
            RequestError: the template refuses the messages, or fails on them.
        """
        plain = messages_for_template(messages, takes_parts=self._takes_parts)
        plain_tools = json.loads(json.dumps(list(tools))) if tools else None
        try:
            return self._template.render(
                messages=plain,
                tools=plain_tools,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
                **{DATE_FUNCTION: (today or datetime.datetime.now()).strftime},
            )
        except Exception as error:  # a template is a program: whatever it raises, it is this row that cannot be run
            raise RequestError(f"the model's chat template refuses these messages: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        """What the template said, if those very words stand in it; anything else could repeat the prompt."""
        message = str(error)
        is_literal = message and any(quote + message + quote in self._source for quote in ("'", '"'))
        return message if is_literal else f"{type(error).__name__} while rendering"


def _environment() -> jinja2.Environment:
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's own words for training; here it only passes them through."""

        tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # jinja2's own tojson escapes HTML and cannot keep non-ASCII text as it is.
    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _goes_through_parts(environment: jinja2.Environment, source: str) -> bool:
    """Whether a template has a loop over a message's content, which must then be able to take its parts."""
    from jinja2 import nodes

    tree = environment.parse(source)
    named = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, frozenset())
    }
    return any(_is_content(loop.iter, named) for loop in tree.find_all(nodes.For))


def _is_content(node: jinja2.nodes.Node, names: Collection[str]) -> bool:
    """Whether an expression is some object's `content`, or one of the names that stand for it."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


def find_template_sources(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Template sources of a model directory by name; "default" is the usual one, "tool_use" serves rows with tools.

    Looks, first found first taken, at ``chat_template.jinja`` (and ``additional_chat_templates/*.jinja``),
    ``chat_template.json``, and ``chat_template`` in ``tokenizer_config.json``. Empty where the model has none.

    Raises:
        CheckpointError: a file cannot be read or holds something else.
    """
    single = model_dir / "chat_template.jinja"
    if single.is_file():
        named = sorted((model_dir / "additional_chat_templates").glob("*.jinja"))
        return {"default": read_checkpoint_text(single), **{path.stem: read_checkpoint_text(path) for path in named}}
    wrapped = model_dir / "chat_template.json"
    if wrapped.is_file():
        content = read_json_object(wrapped)
        return _named_sources(content.get("chat_template"), wrapped)
    return _named_sources(tokenizer_config.get("chat_template"), model_dir / "tokenizer_config.json")


def _named_sources(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
        value = dict(pairs) if all(isinstance(name, str) for name, _ in pairs) else None
    if isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair):
        return dict(value)
    raise CheckpointError(f"{path}: chat_template must be a string, or named strings")
