"""Tokens one at a time give the text of all of them; stop strings are found as soon as they stand there."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_dist.errors import CheckpointError
from lepton_dist.text.detokenizer import IncrementalDetokenizer, StopScanner, finished_text
from lepton_dist.text.pieces import decoding_of
from lepton_dist.text.tokenizer import Tokenizer

KINDS = ["byte_level", "sentence_piece", "sentence_piece_unstripped", "metaspace", "words"]
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


@pytest.mark.parametrize("kind", KINDS)
@FAST
@given(data=st.data())
def test_pushes_and_flush_join_to_the_decoded_text(
    kind: str, all_tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    tokenizer = all_tokenizers[kind]
    ids = some_ids(data, tokenizer)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)
    # What was given out is never taken back by later tokens.
    cut = data.draw(st.integers(0, len(ids)))
    resumed = IncrementalDetokenizer(tokenizer, ids[:cut])
    rest = "".join(resumed.push(token_id) for token_id in ids[cut:]) + resumed.flush()
    assert "".join(pieces[:cut]) + rest == tokenizer.decode(ids)


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
    ids = some_ids(data, tokenizer)
    texts = [tokenizer.decode(ids[: count + 1]) for count in range(len(ids))]
    # Stops out of the text itself, or the test would hardly ever find one; none with U+FFFD, which stands for bytes
    # that may yet become a character.
    whole = (texts[-1] if texts else "") or "ab"
    start = data.draw(st.integers(0, len(whole) - 1))
    cut_out = whole[start : start + data.draw(st.integers(1, 5))].replace(REPLACEMENT, "") or "a"
    stops = data.draw(st.permutations([cut_out, data.draw(TEXTS) or "b"]))
    expected = next((place for place, text in enumerate(texts) if any(stop in text for stop in stops)), None)

    scanner = StopScanner(tokenizer, stops)
    found = next((place for place, token_id in enumerate(ids) if scanner.push(token_id)), None)
    assert found == expected
    if found is None:
        assert finished_text(tokenizer, ids, stops) == tokenizer.decode(ids)
        return
    earliest = min(text for text in (texts[found].find(stop) for stop in stops) if text >= 0)
    assert scanner.cut == earliest
    assert scanner.found is not None
    assert texts[found].startswith(scanner.found, earliest)
    # The text is the same whether or not more tokens came before the engine noticed.
    assert finished_text(tokenizer, ids, stops) == finished_text(tokenizer, ids[: found + 1], stops)
    assert finished_text(tokenizer, ids, stops) == texts[found][:earliest]


def test_a_stop_inside_a_byte_run_is_seen_at_once(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["sentence_piece"]
    ids = _byte_ids(tokenizer, "sentence_piece", "ä€".encode())
    scanner = StopScanner(tokenizer, ["€"])
    assert [scanner.push(token_id) for token_id in ids] == [False] * 4 + [True]
    assert finished_text(tokenizer, ids, ["€"]) == "ä"


def test_a_long_byte_run_is_no_neighbour_of_what_came_before_it(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["sentence_piece"]
    ids = tokenizer.encode("an", add_special_tokens=False) + _byte_ids(tokenizer, "sentence_piece", "x€z??n€z".encode())
    scanner = StopScanner(tokenizer, ["n€z"])
    assert [scanner.push(token_id) for token_id in ids][-2:] == [False, True]
    assert finished_text(tokenizer, ids, ["n€z"]) == "anx€z??"


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
