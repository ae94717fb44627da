"""Tokens one at a time give the text of all of them; stop strings are found as soon as they stand there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import takewhile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_dist.errors import CheckpointError
from lepton_dist.text.detokenizer import IncrementalDetokenizer, StopScanner, finished_text, num_preceding
from lepton_dist.text.pieces import decoding_of
from lepton_dist.text.tokenizer import Tokenizer

KINDS = ["byte_level", "sentence_piece", "sentence_piece_unstripped", "metaspace", "words", "word_pieces"]
TEXTS = st.text(alphabet=st.sampled_from("ab de,.é世界😀\u200d👩\n ▁"), max_size=12)
FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
REPLACEMENT = "\ufffd"


def some_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Ids of real text and wild ones mixed: special, not there, and with them broken characters."""
    parts = data.draw(
        st.lists(
            st.one_of(
                TEXTS.map(lambda text: tokenizer.encode(text)),
                st.lists(st.integers(0, 460), max_size=6),
                st.lists(st.integers(1, 256), min_size=1, max_size=6),
            ),
            max_size=6,
        )
    )
    return [token_id for part in parts for token_id in part]


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of prompt and output together, from where it departs from the prompt's own."""
    before, text = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False)))
    return text[shared:]


def last_tokens(tokenizer: Tokenizer, prompt: list[int]) -> list[int]:
    return prompt[len(prompt) - num_preceding(tokenizer, prompt) :]


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(data=st.data())
def test_pushes_and_flush_join_to_the_continuation_of_the_prompt(
    kind: str, all_tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    tokenizer = all_tokenizers[kind]
    prompt, ids = some_ids(data, tokenizer), some_ids(data, tokenizer)
    expected = continuation(tokenizer, prompt, ids)
    preceding = last_tokens(tokenizer, prompt)
    assert finished_text(tokenizer, ids, preceding) == expected
    detokenizer = IncrementalDetokenizer(tokenizer, preceding)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == expected


@pytest.mark.parametrize("kind", ["sentence_piece", "metaspace"])
def test_the_space_of_the_first_new_token_is_kept(kind: str, all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers[kind]
    prompt, ids = tokenizer.encode("The quick"), tokenizer.encode("and again", add_special_tokens=False)
    preceding = last_tokens(tokenizer, prompt)
    assert 1 <= len(preceding) < len(prompt)
    assert finished_text(tokenizer, ids, preceding) == " and again"
    scanner = StopScanner(tokenizer, [" and"], preceding)
    found = next(count for count, token_id in enumerate(ids, start=1) if scanner.push(token_id))
    assert (finished_text(tokenizer, ids[:found], preceding, cut=scanner.cut), scanner.found) == ("", " and")
    # Behind nothing that shows, the text begins with the output, as it does in the text of both together.
    assert finished_text(tokenizer, ids, last_tokens(tokenizer, [tokenizer.bos_token_id or 0])) == "and again"
    assert finished_text(tokenizer, ids) == "and again"


def test_a_character_that_begins_in_the_prompt(all_tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("byte_level", "sentence_piece"):
        tokenizer = all_tokenizers[kind]
        ids = _byte_ids(tokenizer, kind, "€x".encode())
        prompt = [*tokenizer.encode("a"), *ids[:2]]
        preceding = last_tokens(tokenizer, prompt)
        assert finished_text(tokenizer, ids[2:], preceding) == "€x"
        scanner = StopScanner(tokenizer, ["€"], preceding)
        assert next(scanner.push(token_id) for token_id in ids[2:])
        assert scanner.cut == 0


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_a_split_character_shows_once_it_is_whole(kind: str, all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers[kind]
    byte_ids = _byte_ids(tokenizer, kind, "€x".encode())
    detokenizer = IncrementalDetokenizer(tokenizer)
    texts = [detokenizer.push(token_id) for token_id in byte_ids]
    assert texts[:2] == ["", ""]
    assert "".join(texts) + detokenizer.flush() == "€x"
    assert REPLACEMENT not in "".join(texts)


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_a_character_that_never_completes_is_replaced_at_the_end(
    kind: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[kind]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(_byte_ids(tokenizer, kind, b"\xe2")[0]) == ""
    assert detokenizer.flush() == REPLACEMENT


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(data=st.data())
def test_scanner_stops_where_the_decoded_text_first_holds_a_stop(
    kind: str, all_tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    tokenizer = all_tokenizers[kind]
    prompt, ids = some_ids(data, tokenizer), some_ids(data, tokenizer)
    texts = [continuation(tokenizer, prompt, ids[: count + 1]) for count in range(len(ids))]
    # Stops out of the text itself, or the test would hardly ever find one; none with U+FFFD, which stands for bytes
    # that may yet become a character.
    whole = (texts[-1] if texts else "") or "ab"
    start = data.draw(st.integers(0, len(whole) - 1))
    cut_out = whole[start : start + data.draw(st.integers(1, 5))].replace(REPLACEMENT, "") or "a"
    stops = data.draw(st.permutations([cut_out, data.draw(TEXTS) or "b"]))
    expected = next((place for place, text in enumerate(texts) if any(stop in text for stop in stops)), None)

    preceding = last_tokens(tokenizer, prompt)
    scanner = StopScanner(tokenizer, stops, preceding)
    found = next((place for place, token_id in enumerate(ids) if scanner.push(token_id)), None)
    assert found == expected
    if found is None:
        return
    earliest = min(text for text in (texts[found].find(stop) for stop in stops) if text >= 0)
    assert scanner.cut == earliest
    assert scanner.found is not None
    assert texts[found].startswith(scanner.found, earliest)
    assert finished_text(tokenizer, ids[: found + 1], preceding, cut=scanner.cut) == texts[found][:earliest]


def test_a_stop_inside_a_byte_run_is_seen_at_once(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["sentence_piece"]
    ids = _byte_ids(tokenizer, "sentence_piece", "ä€".encode())
    scanner = StopScanner(tokenizer, ["€"])
    assert [scanner.push(token_id) for token_id in ids] == [False] * 4 + [True]
    assert finished_text(tokenizer, ids, cut=scanner.cut) == "ä"


def test_a_long_byte_run_is_no_neighbour_of_what_came_before_it(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["sentence_piece"]
    ids = tokenizer.encode("an", add_special_tokens=False) + _byte_ids(tokenizer, "sentence_piece", "x€z??n€z".encode())
    scanner = StopScanner(tokenizer, ["n€z"])
    assert [scanner.push(token_id) for token_id in ids][-2:] == [False, True]
    assert finished_text(tokenizer, ids, cut=scanner.cut) == "anx€z??"


def test_the_ending_token_is_left_out_even_if_it_is_an_ordinary_one(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["byte_level"]
    ids = tokenizer.encode("again.")
    assert finished_text(tokenizer, ids, is_ended_by_token=True) == tokenizer.decode(ids[:-1])
    assert finished_text(tokenizer, ids) == "again."


def test_scanning_costs_the_same_for_each_token(all_tokenizers: dict[str, Tokenizer]) -> None:
    for kind, ids in {
        "byte_level": [97],
        "sentence_piece": _byte_ids(all_tokenizers["sentence_piece"], "", b"a"),
    }.items():
        scanner = StopScanner(all_tokenizers[kind], ["never", "stops"])
        times = []
        for _ in range(8):
            start = time.process_time()
            for _ in range(2000):
                assert not scanner.push(ids[0])
            times.append(time.process_time() - start)
        assert min(times[4:]) < 5 * max(min(times[:4]), 1e-4), kind


def test_a_decoder_that_cannot_be_followed_is_refused() -> None:
    from tokenizers import decoders

    with pytest.raises(CheckpointError, match="CTC"):
        decoding_of(decoders.CTC())
    with pytest.raises(CheckpointError, match="regular expression"):
        from tokenizers import Regex

        decoding_of(decoders.Replace(Regex("a+"), "b"))


def _byte_ids(tokenizer: Tokenizer, kind: str, data: bytes) -> list[int]:
    """Ids of single bytes."""
    if kind == "byte_level":
        by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(2, 258))}
        return [by_bytes[bytes([value])] for value in data]
    return [1 + value for value in data]
