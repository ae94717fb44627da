"""Text of generated tokens: the continuation of the prompt's text, whole or one token at a time, and its stop strings.

What a token adds can depend on what precedes it: SentencePiece drops the space of a text's first token, and a character
may begin in the prompt. So the text of an output is the text of prompt and output together, from where it departs from
the prompt's own text. The last tokens of the prompt, its *preceding* tokens, suffice to find it.

A character split over tokens shows once it is whole. Where tokens stand for single bytes, a run of them is text only
if the whole run is valid UTF-8 (so the tokenizers library has it), so its text is *tentative* until the run ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from lepton_dist.errors import CheckpointError
from lepton_dist.text.pieces import Decoding, byte_level_bytes
from lepton_dist.text.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so at most three of them can precede a token that completes it.
_MAX_OPEN_BYTES = 3
# What precedes a token may matter in a decoder that is not known here; none is known where more tokens would.
_UNKNOWN_PRECEDING = 8


def num_preceding(tokenizer: Tokenizer, prompt: Sequence[int]) -> int:
    """How many of a prompt's last tokens decide how the text goes on: those that `finished_text` must be given."""
    try:
        decoding = tokenizer.decoding
    except CheckpointError:  # matters only to those who want to follow it
        return min(len(prompt), _UNKNOWN_PRECEDING)
    found = 0
    for count, token_id in enumerate(reversed(prompt), start=1):
        token = tokenizer.decodable_token(token_id)
        if token is None:
            continue
        found += 1
        if decoding.is_byte_level:
            is_enough = found > _MAX_OPEN_BYTES
        else:
            # Of a run of bytes all must be seen, and of spaces that the start of a text could lose.
            is_enough = decoding.byte(decoding.piece(token, False)) is None and decoding.holds_start(token)
        if is_enough:
            return count
    return len(prompt)


class IncrementalDetokenizer:
    """Follows one sample. All texts returned, joined, equal `finished_text` of all ids.

    Args:
        preceding: the prompt's last tokens, at least as many as `num_preceding` says; their text is not returned.

    Raises:
        CheckpointError: the tokenizer's decoder is of a kind that cannot be followed.
    """

    def __init__(self, tokenizer: Tokenizer, preceding: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = _stream(tokenizer.decoding)
        for token_id in preceding:
            token = tokenizer.decodable_token(token_id)
            if token is not None:
                self._stream.push(token)
        # The prompt's own text shows this for what is still held back; it is no part of the output's text.
        self._prompt_tail = self._stream.pending()
        shown = "".join(self._stream.tentative)
        self._skipped_tentative = len(shown) if shown == self._prompt_tail else 0

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token, and was not before; often empty."""
        token = self._tokenizer.decodable_token(token_id)
        return "" if token is None else self._beyond_prompt(self._stream.push(token))

    def flush(self) -> str:
        """The rest: what was held back. A character that was never completed comes out as U+FFFD."""
        return self._beyond_prompt(self._stream.flush())

    @property
    def tentative_length(self) -> int:
        """How many whole characters are held back that later bytes could still make invalid."""
        return len(self._stream.tentative) - self._skipped_tentative

    def tentative_tail(self, count: int) -> str:
        """The last `count` of these characters (all of them, where there are fewer)."""
        tentative = self._stream.tentative
        return "".join(tentative[max(len(tentative) - count, self._skipped_tentative) :])

    def _beyond_prompt(self, text: str) -> str:
        """The first text that becomes certain, without what the prompt has shown of it."""
        if not text or not self._prompt_tail:
            return text
        shared = _shared_length(text, self._prompt_tail)
        self._prompt_tail, self._skipped_tentative = "", 0
        return text[shared:]


class StopScanner:
    """Watches one sample for stop strings, at a constant cost a token; `preceding` as in `IncrementalDetokenizer`.

    Attributes:
        found: the stop string that ended the text: the earliest; of several at one place the first listed.
        cut: the length of the text before it, in characters.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], preceding: Sequence[int] = ()) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._detokenizer = IncrementalDetokenizer(tokenizer, preceding) if stops else None
        # The end of the certain text, long enough for a stop string that is one character short of complete.
        self._tail = ""
        self._settled_length = 0
        self.found: str | None = None
        self.cut = 0

    def push(self, token_id: int) -> bool:
        """Whether a stop string stands complete in the text so far."""
        if self._detokenizer is None or self.found is not None:
            return self.found is not None
        settled = self._detokenizer.push(token_id)
        tentative = self._detokenizer.tentative_tail(self._longest)
        visible = self._tail + settled + tentative
        self._settled_length += len(settled)
        # Where a long tentative run is cut to its tail, the certain text before it is not its neighbour.
        if self._detokenizer.tentative_length > self._longest:
            visible = tentative
        starts = [(visible.find(stop), order) for order, stop in enumerate(self._stops) if stop in visible]
        if starts:
            start, order = min(starts)
            self.found = self._stops[order]
            end = self._settled_length + self._detokenizer.tentative_length
            self.cut = end - len(visible) + start
            return True
        self._tail = (self._tail + settled)[-(self._longest - 1) :] if self._longest > 1 else ""
        return False


def finished_text(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    preceding: Sequence[int] = (),
    *,
    cut: int | None = None,
    is_ended_by_token: bool = False,
) -> str:
    """The text of a finished sample.

    Args:
        ids: the generated ids.
        preceding: the prompt's last tokens, as many as `num_preceding` says.
        cut: where a stop string begins in the text (`StopScanner.cut`); what follows is left out.
        is_ended_by_token: the last id is an end token or stop token, which is not part of the text. False where a
            stop string or a length ended it.
    """
    kept = ids[:-1] if is_ended_by_token else ids
    before, text = tokenizer.decode(preceding), tokenizer.decode([*preceding, *kept])
    start = _shared_length(before, text)
    return text[start : None if cut is None else start + cut]


def _shared_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their start."""
    if second.startswith(first):
        return len(first)
    return next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))


def _stream(decoding: Decoding) -> _ByteStream | _PieceStream:
    return _ByteStream() if decoding.is_byte_level else _PieceStream(decoding)


class _ByteStream:
    """Byte-level BPE: one stream of bytes, invalid ones replaced."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.tentative: list[str] = []

    def push(self, token: str) -> str:
        return self._decoder.decode(byte_level_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def pending(self) -> str:
        """What `flush` would give, and the stream goes on."""
        return _REPLACEMENT if self._decoder.getstate()[0] else ""


class _PieceStream:
    """SentencePiece: text, with runs of single bytes in it. An invalid run becomes one U+FFFD a byte."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._is_first = True
        # How many more characters may be taken off the start of the text; 0 as soon as another one stands there.
        self._strippable = decoding.stripped_count
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._run_bytes = 0
        self._is_run_invalid = False
        self.tentative: list[str] = []
        self._strippable_after_run = self._strippable

    def push(self, token: str) -> str:
        piece = self._decoding.piece(token, self._is_first)
        self._is_first = False
        value = self._decoding.byte(piece)
        if value is not None:
            return self._push_byte(value)
        run_text = self.flush()
        text, self._strippable = self._stripped(piece, self._strippable)
        return run_text + text

    def flush(self) -> str:
        """End the run of bytes, if there is one; its text."""
        text = self.pending()
        if self._run_bytes and not self._is_run_invalid:
            self._strippable = 0 if self._is_incomplete else self._strippable_after_run
        self._utf8.reset()
        self._run_bytes, self._is_run_invalid, self.tentative = 0, False, []
        return text

    def pending(self) -> str:
        """What `flush` would give, and the stream goes on."""
        if not self._run_bytes or self._is_run_invalid:
            return ""
        return _REPLACEMENT * self._run_bytes if self._is_incomplete else "".join(self.tentative)

    @property
    def _is_incomplete(self) -> bool:
        """Whether the run of bytes ends within a character."""
        return bool(self._utf8.getstate()[0])

    def _push_byte(self, value: int) -> str:
        if self._run_bytes == 0:
            self._strippable_after_run = self._strippable
        self._run_bytes += 1
        if self._is_run_invalid:
            return _REPLACEMENT
        try:
            characters = self._utf8.decode(bytes([value]))
        except UnicodeDecodeError:
            # Whatever follows, this run is invalid: all its bytes so far are replaced, and each later one at once.
            self.tentative, self._is_run_invalid, self._strippable = [], True, 0
            return _REPLACEMENT * self._run_bytes
        characters, self._strippable_after_run = self._stripped(characters, self._strippable_after_run)
        self.tentative.extend(characters)
        return ""

    def _stripped(self, text: str, strippable: int) -> tuple[str, int]:
        while strippable and text:
            if text[0] != self._decoding.stripped:
                return text, 0
            text, strippable = text[1:], strippable - 1
        return text, strippable
