"""How a tokenizer's decoder turns tokens into text, in a form that can be followed one token at a time.

Three kinds cover today's language models. In byte-level BPE every token is a string of bytes. SentencePiece's tokens
are text with a mark for the space, and single bytes (``<0xE4>``) where the vocabulary lacks a character. Of word pieces
a mark says that a token continues a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lepton_dist.errors import CheckpointError

# As the tokenizers library does it in the decoder of word pieces.
_TIDIED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Decoding:
    """The steps from a token, as it stands in the vocabulary, to its part of the text.

    Attributes:
        is_byte_level: tokens are bytes written in the byte-level alphabet; nothing else applies then.
        replacements: (old, new) strings replaced in each token.
        space_mark: a character that stands for a space, or "".
        is_first_mark_dropped: the marks of a text's first token are dropped instead.
        has_byte_fallback: ``<0xE4>`` is the byte E4.
        stripped: a character, at most `stripped_count` of which are taken off the start of the whole text.
        joiner: what stands between tokens.
        continuing_mark: at the start of a token it stands for nothing between this one and the one before, or "".
        is_tidied: the space before punctuation and the like is taken out of each token, as of English text.
    """

    is_byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    space_mark: str = ""
    is_first_mark_dropped: bool = False
    has_byte_fallback: bool = False
    stripped: str = ""
    stripped_count: int = 0
    joiner: str = ""
    continuing_mark: str = ""
    is_tidied: bool = False

    def piece(self, token: str, is_first: bool) -> str:
        """A token's text, in a decoding by text."""
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.space_mark:
            token = token.replace(self.space_mark, "" if is_first and self.is_first_mark_dropped else " ")
        if not is_first:
            is_continuing = self.continuing_mark and token.startswith(self.continuing_mark)
            token = token.removeprefix(self.continuing_mark) if is_continuing else self.joiner + token
        if self.is_tidied:
            for old, new in _TIDIED:
                token = token.replace(old, new)
        return token

    def holds_start(self, token: str) -> bool:
        """Whether what follows this token is the same whatever precedes it, in a decoding by text.

        Not where the token's text could be stripped whole, so that more would be taken off what follows.
        """
        return not self.stripped_count or bool(self.piece(token, False).strip(self.stripped))

    def byte(self, token: str) -> int | None:
        """The byte that a token stands for by itself, in a decoding with byte fallback; None for a token of text."""
        match = _BYTE_TOKEN.fullmatch(token) if self.has_byte_fallback and len(token) == 6 else None
        return None if match is None else int(match.group(1), 16)

    def piece_bytes(self, token: str, is_first: bool = False) -> bytes:
        """The UTF-8 bytes that a token adds in the midst of a text, or as its first token."""
        if self.is_byte_level:
            return byte_level_bytes(token)
        piece = self.piece(token, is_first)
        value = self.byte(piece)
        text = piece.encode("utf-8") if value is None else bytes([value])
        if is_first and self.stripped_count:
            stripped = len(text) - len(text.lstrip(self.stripped.encode("utf-8")))
            text = text[min(stripped, self.stripped_count) :]
        return text


def _alphabet() -> Mapping[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the other 68 are shifted beyond U+00FF in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(value): value for value in printable} | {chr(256 + place): value for place, value in enumerate(others)}


_BYTE_LEVEL_ALPHABET = _alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; one with a character outside that alphabet stands for its own UTF-8."""
    try:
        return bytes([_BYTE_LEVEL_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def decoding_of(decoder: Any) -> Decoding:
    """The decoding of a decoder of the tokenizers library; None, as there, joins tokens with spaces.

    Raises:
        CheckpointError: a kind, or an order of steps, that cannot be followed token by token.
    """
    if decoder is None:
        return Decoding(joiner=" ")
    steps = _flattened(json.loads(decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds and kinds[0] == "ByteLevel" and set(kinds[1:]) <= {"Fuse"}:
        return Decoding(is_byte_level=True)
    if kinds == ["WordPiece"]:
        return Decoding(joiner=" ", continuing_mark=steps[0]["prefix"], is_tidied=bool(steps[0]["cleanup"]))
    if not re.fullmatch(r"(Replace )*(Metaspace )?(ByteFallback )?(Fuse )?(Strip )?", "".join(k + " " for k in kinds)):
        raise _unknown(" then ".join(kinds))
    if "Strip" in kinds and "Fuse" not in kinds:
        raise _unknown("Strip of each token")
    fields: dict[str, Any] = {"has_byte_fallback": "ByteFallback" in kinds}
    replacements = []
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                raise _unknown("Replace with a regular expression")
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            fields.update(
                space_mark=step["replacement"], is_first_mark_dropped=step.get("prepend_scheme", "always") != "never"
            )
        elif step["type"] == "Strip":
            if step["stop"]:
                raise _unknown("Strip at the end of the text")
            fields.update(stripped=step["content"], stripped_count=step["start"])
    return Decoding(replacements=tuple(replacements), **fields)


def _flattened(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flattened(part)]


def _unknown(what: str) -> CheckpointError:
    return CheckpointError(
        f"tokenizer.json: its decoder ({what}) cannot be followed token by token; known are ByteLevel, WordPiece, "
        "and Replace, Metaspace, ByteFallback, Fuse, Strip in this order"
    )
