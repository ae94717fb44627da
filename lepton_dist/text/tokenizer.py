"""A checkpoint's tokenizer: text to token ids, ids to text, chats to text."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_dist.checkpoint_files import read_json_object
from lepton_dist.config.sampling import is_encodable
from lepton_dist.errors import RequestError
from lepton_dist.text.chat_template import DATE_FUNCTION, ChatTemplate, find_template_sources
from lepton_dist.text.pieces import Decoding, decoding_of
from lepton_dist.text.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    import tokenizers

_MAX_U32 = 2**32
# A prompt of more characters for each token of the context is looked at in part first. Text has about 4 a token.
_CHARACTERS_A_TOKEN = 8


class Tokenizer:
    """The tokenizer of one model directory. Safe to share between threads.

    Use `Tokenizer.load`; the constructor takes the parts that it found.

    Attributes:
        bos_token, eos_token: the text of these tokens where the checkpoint names them.
        bos_token_id, eos_token_id: their ids.
        notice: what the user should know of how the files were read; often empty.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], template_sources: Mapping[str, str]
    ) -> None:
        # A tokenizer.json may carry the limits of its training; a prompt is never cut or padded silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._template_sources = dict(template_sources)
        self._templates: dict[str, ChatTemplate] = {}
        self._special_texts = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        self._decoding: Decoding | None = None
        self.notice = ""

    @classmethod
    def load(cls, model_dir: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, and what the files beside it say of its tokens and the chat template.

        Raises:
            CheckpointError: a file is absent or cannot be understood; names it.
        """
        directory = Path(model_dir)
        loaded = load_tokenizer(directory)
        config_path = directory / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        tokenizer = cls(loaded.backend, loaded.special_tokens, find_template_sources(directory, config))
        tokenizer.notice = loaded.notice
        return tokenizer

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a sequence, where the checkpoint names one."""
        return self._special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a sequence, where the checkpoint names one."""
        return self._special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return None if self.bos_token is None else self._id_of(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        return None if self.eos_token is None else self._id_of(self.eos_token)

    @property
    def has_chat_template(self) -> bool:
        """Whether rows with messages can be run."""
        return bool(self._template_sources)

    def encode(self, text: str, *, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer itself adds unless told otherwise.

        Args:
            most: ids beyond this number are of no use: a text of far more is refused by its beginning, since a
                megabyte takes seconds.

        Raises:
            RequestError: the text holds a lone surrogate, or is far too long.
        """
        if not is_encodable(text):
            raise RequestError("the text holds a lone surrogate (half of a UTF-16 pair); it must be valid Unicode")
        length = len(text) if most is None else _CHARACTERS_A_TOKEN * most
        while most is not None and length < len(text):
            # Another cut can change the tokens at its very end, so that a few more prove nothing.
            num_tokens = len(self._backend.encode(text[:length], add_special_tokens=False).ids)
            if num_tokens > most + most // 16 + 64:
                raise RequestError(
                    f"the first {length} of the prompt's {len(text)} characters are {num_tokens} tokens, but the "
                    f"context holds {most}: shorten the prompt",
                    kind="context_length_exceeded",
                )
            length *= 2
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens, and ids that the tokenizer lacks, decode to nothing."""
        text: str = self._backend.decode([i for i in ids if 0 <= i < _MAX_U32], skip_special_tokens=True)
        return text

    def token_text(self, token_id: int, *, is_first: bool = False) -> str:
        """One token by itself, as it reads inside a text: with its leading space; a part of a character is U+FFFD.

        Special tokens show their name, ids that the tokenizer lacks are empty. As the first token of a text
        (`is_first`) it may lack its leading space.
        """
        return self.token_bytes(token_id, is_first=is_first).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        """The UTF-8 bytes that one token adds to a text; fewer than a character where it is split over tokens."""
        text = self._raw_token(token_id)
        if text is None:
            return b""
        return text.encode("utf-8") if text in self._special_texts else self.decoding.piece_bytes(text, is_first)

    @property
    def tells_date(self) -> bool:
        """Whether a chat template asks for the date: `today` then belongs to the identity of a run."""
        return any(DATE_FUNCTION in source for source in self._template_sources.values())

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        today: datetime.datetime | None = None,
    ) -> str:
        """The text of a chat up to where the assistant's answer begins; encode it without adding special tokens.

        `today` is what a template is told that asks for the date; None is now.

        Raises:
            RequestError: the model has no chat template, or its template refuses the messages.
        """
        if not self._template_sources:
            raise RequestError("the model has no chat template, so messages cannot be rendered; give a prompt instead")
        name = "tool_use" if tools and "tool_use" in self._template_sources else "default"
        if name not in self._template_sources:
            names = ", ".join(sorted(self._template_sources))
            raise RequestError(f"the model has no default chat template, only: {names}")
        return self._template(name).render(messages, tools, today=today)

    def _template(self, name: str) -> ChatTemplate:
        if name not in self._templates:
            self._templates[name] = ChatTemplate(self._template_sources[name], self._special_tokens)
        return self._templates[name]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        today: datetime.datetime | None = None,
        most: int | None = None,
    ) -> list[int]:
        """The ids of a rendered chat. The template wrote its special tokens itself, so none are added.

        Raises:
            RequestError: as `render_chat` and `encode`.
        """
        return self.encode(self.render_chat(messages, tools, today=today), add_special_tokens=False, most=most)

    @property
    def decoding(self) -> Decoding:
        """How tokens become text, for callers that take them one at a time.

        Raises:
            CheckpointError: the tokenizer's decoder is of a kind that cannot be followed token by token.
        """
        if self._decoding is None:
            self._decoding = decoding_of(self._backend.decoder)
        return self._decoding

    def decodable_token(self, token_id: int) -> str | None:
        """A token as it stands in the vocabulary; None for one that decoding skips: special, or not there."""
        token = self._raw_token(token_id)
        return None if token in self._special_texts else token

    def _raw_token(self, token_id: int) -> str | None:
        token: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < _MAX_U32 else None
        return token

    def _id_of(self, token: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(token)
        return token_id
