"""Small tokenizers of every kind of decoder, trained on a few sentences in many scripts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lepton_dist.text.tokenizer import Tokenizer

CORPUS = [
    "def main(argument): return argument + 1  # a comment",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "Grüße aus Köln; naïve café; ¿qué tal?",
    "世界你好，こんにちは 😀 family 👨‍👩‍👧 done",
] * 3
WORDS = ["the", "cat", "again", "and", "un", "do", "not"]
SPECIAL = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False)])
    return backend


def sentence_piece(*, strips: bool = True) -> tokenizers.Tokenizer:
    """Llama 2's kind: Metaspace marks, byte fallback for characters outside a small alphabet."""
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, limit_alphabet=40, show_progress=False)
    plain.train_from_iterator(CORPUS, trainer)
    vocab = {"<unk>": 0} | {f"<0x{value:02X}>": 1 + value for value in range(256)}
    for token, _ in sorted(plain.get_vocab().items(), key=lambda item: item[1]):
        vocab.setdefault(token, len(vocab))
    pairs = [
        (left, right)
        for left in vocab
        for right in vocab
        if left + right in vocab and not left.startswith("<") and not right.startswith("<")
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def metaspace() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def words() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        special_tokens=[*SPECIAL, AddedToken("<unk>", special=True)], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_pieces() -> tokenizers.Tokenizer:
    vocab = [
        "[UNK]",
        "<s>",
        "</s>",
        *WORDS,
        "##un",
        "##able",
        *"abcdefghijklmnopqrstuvwxyz.,!?'",
        *(f"##{c}" for c in "abxyz.,!"),
    ]
    backend = tokenizers.Tokenizer(
        models.WordPiece({token: place for place, token in enumerate(vocab)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(SPECIAL)
    return backend


BACKENDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "sentence_piece": sentence_piece,
    "sentence_piece_unstripped": lambda: sentence_piece(strips=False),
    "metaspace": metaspace,
    "words": words,
    "word_pieces": word_pieces,
}


@pytest.fixture(scope="session")
def backends() -> dict[str, Callable[[], tokenizers.Tokenizer]]:
    """Makers of the library's own tokenizers, by kind."""
    return BACKENDS


@pytest.fixture(scope="session")
def all_tokenizers() -> dict[str, Tokenizer]:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return {name: Tokenizer(make(), names, {}) for name, make in BACKENDS.items()}
