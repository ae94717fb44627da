"""A checkpoint's tokenizer out of its files, as transformers 5 puts it together.

``tokenizer.json`` is most of it. Added tokens stand in ``tokenizer_config.json`` too, or in ``added_tokens.json`` and
``special_tokens_map.json`` beside it, and override those of tokenizer.json. Some of transformers' classes are rebuilt:
they take the vocabulary from tokenizer.json, but cut and join text in their own way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lepton_dist.checkpoint_files import read_checkpoint_bytes, read_json_object
from lepton_dist.config.sampling import shown_value
from lepton_dist.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

_Result = TypeVar("_Result")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
# Classes that take tokenizer.json as it stands; so does a checkpoint that names none.
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")
# Families for which transformers takes tokenizer.json as it stands, or the class of Qwen2, whatever class is named.
_PLAIN_FAMILIES = ("mistral",)
_QWEN_FAMILIES = ("qwen2",)
# From transformers' class Qwen2Tokenizer (Apache License 2.0).
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer, its special tokens' texts by name (``bos_token``, ...), and what its user should know."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    notice: str = ""


@dataclass(frozen=True)
class _Files:
    """What the files beside tokenizer.json say."""

    config_path: Path
    config: Mapping[str, Any]
    named: Mapping[str, Any]
    added: Mapping[str, Any]
    model: Mapping[str, Any]

    @staticmethod
    def read(directory: Path) -> _Files:
        paths = [directory / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")]
        read = [read_json_object(path) if path.is_file() else {} for path in [*paths, directory / "config.json"]]
        config, named, added, model = read
        if "added_tokens_decoder" in config:  # says it all
            named, added = {}, {}
        return _Files(paths[0], config, named, added, model)

    @property
    def settings(self) -> dict[str, Any]:
        """Special tokens and options by name; special_tokens_map.json overrides tokenizer_config.json."""
        return {**self.config, **self.named}


@dataclass(frozen=True)
class _Build:
    """How one of transformers' classes builds a tokenizer anew, and the special tokens that it has by default."""

    assemble: Callable[[tokenizers.Tokenizer, Mapping[str, Any]], None]
    defaults: Mapping[str, str] = field(default_factory=dict)
    adds_named: bool = False


def load_tokenizer(directory: Path) -> LoadedTokenizer:
    """The tokenizer of a model directory.

    Raises:
        CheckpointError: a file is absent or cannot be understood; names it.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: is absent; text needs the checkpoint's tokenizer in this form")
    data, files = read_checkpoint_bytes(path), _Files.read(directory)
    backend = _parsed(path, data)
    name = _class_name(files, is_byte_level=b'"ByteLevel"' in data)
    build = _builds().get(name) if type(backend.model).__name__ == "BPE" else None
    added = dict(_added_tokens(files, backend))
    if build is not None:
        if not _covers(added, backend):
            backend = _parsed(path, json.dumps(json.loads(data) | {"added_tokens": []}).encode())
        _guarded(files.config_path, lambda: build.assemble(backend, files.config))
    special = _special_tokens(files, build, added)
    _add(backend, files, added, special)
    names = {key: str(token) for key, token in special.items()}
    if build is not None and build.adds_named:
        backend.add_tokens([_token(text, {"special": True}) for text in dict.fromkeys(names.values())])
    backend.encode_special_tokens = files.config.get("split_special_tokens") is True
    if type(backend.model).__name__ == "BPE":
        backend.model.dropout = None  # meant for training: it would make the ids of a prompt random
    is_followed = build is not None or name in ("", *_PLAIN_CLASSES)
    notice = "" if is_followed else f"{path} is followed as it stands, though the checkpoint names the class {name}"
    return LoadedTokenizer(backend, names, notice)


def _class_name(files: _Files, *, is_byte_level: bool) -> str:
    """The class of transformers that AutoTokenizer takes, without "Fast"; "" where it is none in particular."""
    family = files.model.get("model_type")
    named = files.config.get("tokenizer_class") or files.model.get("tokenizer_class")
    name = named.removesuffix("Fast") if isinstance(named, str) else ""
    if family in _PLAIN_FAMILIES:
        return ""
    if family in _QWEN_FAMILIES or (family == "qwen3" and not name):
        return "Qwen2Tokenizer"
    if family == "gpt2" and not name:
        return "GPT2Tokenizer"
    return "" if name == "LlamaTokenizer" and is_byte_level else name


def _builds() -> dict[str, _Build]:
    end = "<|endoftext|>"
    return {
        "LlamaTokenizer": _Build(_as_llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}),
        "Qwen2Tokenizer": _Build(
            _as_qwen, dict.fromkeys(("unk_token", "eos_token", "pad_token"), end), adds_named=True
        ),
        "GPT2Tokenizer": _Build(_as_gpt2, dict.fromkeys(("unk_token", "bos_token", "eos_token"), end)),
    }


def _as_llama(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    from tokenizers import decoders, pre_tokenizers

    has_prefix = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if has_prefix else "never"
    _plain_bpe(backend, fuse_unk=True, byte_fallback=True)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if has_prefix else steps)


def _as_qwen(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    _plain_bpe(backend)
    backend.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(_QWEN_PIECES), behavior="isolated", invert=False)
    has_prefix = config.get("add_prefix_space") is True
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    backend.decoder = decoders.ByteLevel()


def _as_gpt2(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    from tokenizers import decoders, pre_tokenizers

    _plain_bpe(backend)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
    backend.decoder = decoders.ByteLevel()


def _plain_bpe(backend: tokenizers.Tokenizer, *, fuse_unk: bool = False, byte_fallback: bool = False) -> None:
    model = backend.model
    model.unk_token, model.ignore_merges = None, False
    model.fuse_unk, model.byte_fallback = fuse_unk, byte_fallback


def _added_tokens(files: _Files, backend: tokenizers.Tokenizer) -> Iterator[tuple[int, Any]]:
    """Added tokens by id, as the files beside tokenizer.json have them, or else these and tokenizer.json's own."""
    path, told = files.config_path, files.config.get("added_tokens_decoder")
    if "added_tokens_decoder" in files.config:
        if not isinstance(told, dict):
            raise CheckpointError(f"{path}: added_tokens_decoder is {shown_value(told)}; it must be a mapping")
        for key, flags in told.items():
            if not (key.isascii() and key.isdigit() and len(key) < 10) or not isinstance(flags, dict):
                raise CheckpointError(f"{path}: added_tokens_decoder.{key[:20]}: must map an id to a token's fields")
            yield int(key), _flagged(path, f"added_tokens_decoder.{key}", flags)
        return
    special = {_content(value) for name, value in files.settings.items() if name in _NAMED}
    # transformers does not look at additional_special_tokens of special_tokens_map.json here.
    special |= {_content(value) for value in _extra(files.settings | {_OLD_EXTRA: files.config.get(_OLD_EXTRA)})}
    for text, number in files.added.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
            raise CheckpointError(f"{path.with_name('added_tokens.json')}: the id of {text[:40]!r} is no token id")
        is_special = text in special
        yield number, _token(text, {"special": is_special, "normalized": not is_special})
    yield from sorted(backend.get_added_tokens_decoder().items())


def _covers(added: Mapping[int, Any], backend: tokenizers.Tokenizer) -> bool:
    """Whether adding these tokens leaves nothing of those that are there, so that they need not be taken away first."""
    return all(
        number in added and added[number].content == token.content and (added[number].special or not token.special)
        for number, token in backend.get_added_tokens_decoder().items()
    )


def _special_tokens(files: _Files, build: _Build | None, added: Mapping[int, Any]) -> dict[str, Any]:
    """Named special tokens: each as the added token that it is, or else as its file has it."""
    known = {token.content: token for token in added.values()}
    found: dict[str, Any] = {}
    settings = {**(build.defaults if build is not None else {}), **files.settings}
    more = settings.get(_EXTRA)
    settings.update(more if isinstance(more, dict) else {})
    for name, value in settings.items():
        text = _content(value)
        if text and name.endswith("_token"):
            own = value if isinstance(value, dict) else {}
            is_special = name in _NAMED or not own
            found[name] = known.get(text) or _flagged(
                files.config_path, name, {"special": is_special} | own | {"content": text}
            )
    return found


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    """Special tokens without a name of their own."""
    more = settings.get(_EXTRA) or settings.get(_OLD_EXTRA)
    return more if isinstance(more, list) else []


def _add(backend: tokenizers.Tokenizer, files: _Files, added: Mapping[int, Any], special: Mapping[str, Any]) -> None:
    """Add tokens in the order of their ids, then special tokens that are not among them."""
    named = {str(token.content) for token in special.values()}
    tokens = []
    for _, token in sorted(added.items()):
        is_named = token.content in named and not token.special
        tokens.append(_token(token.content, token.__getstate__() | {"special": True}) if is_named else token)
    there = {token.content for token in [*backend.get_added_tokens_decoder().values(), *tokens]}
    extra = [
        _flagged(
            files.config_path,
            "extra_special_tokens",
            (value if isinstance(value, dict) else {}) | {"content": text, "special": True},
        )
        for value in _extra(files.settings)
        if (text := _content(value))
    ]
    for token in [*special.values(), *extra]:
        if token.content not in there:
            there.add(token.content)
            tokens.append(token)
    backend.add_tokens(tokens)


def _content(value: Any) -> str:
    """The text of a token given as a string or by its fields; "" for anything else."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _flagged(path: Path, key: str, fields: Mapping[str, Any]) -> Any:
    flags = {name: fields[name] for name in _FLAGS if name in fields}
    if not _content(dict(fields)) or not all(isinstance(value, bool) for value in flags.values()):
        raise CheckpointError(
            f"{path}: {key}: must have the text of a token as content, and flags that are true or false"
        )
    return _token(fields["content"], flags)


def _token(text: str, flags: Mapping[str, Any]) -> Any:
    import tokenizers

    return tokenizers.AddedToken(text, **{name: flags[name] for name in _FLAGS if name in flags})


def _parsed(path: Path, data: bytes) -> tokenizers.Tokenizer:
    import tokenizers

    return _guarded(path, lambda: tokenizers.Tokenizer.from_buffer(data))


def _guarded(path: Path, act: Callable[[], _Result]) -> _Result:
    """What `act` gives; whatever the tokenizers library raises, down to its panics, is a fault of the file."""
    try:
        return act()
    except Exception as error:
        raise CheckpointError(f"{path}: is not a tokenizer that can be read: {error}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path}: is not a tokenizer that can be read: {error}") from None
