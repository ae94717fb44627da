"""What a model *is*, by content: copies are equal wherever they lie, and whenever they were written.

Small files are read whole. Of a large weight file its size, its header and some blocks are read, so that 100 GB take
about a second; a change of a few weights in between, which keeps the size, goes unseen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from lepton_dist.errors import CheckpointError
from lepton_dist.storage.index import weight_files

_BLOCK_BYTES = 64 * 1024
_WHOLE_BYTES = 32 * 1024 * 1024
# A safetensors header lies at the start; names, shapes and offsets of a large model's tensors take less than this.
_HEADER_BYTES = 1024 * 1024
_MAX_BLOCKS, _MIN_BLOCKS_PER_FILE, _MAX_BLOCKS_PER_FILE = 256, 2, 16
# What is read of a model besides its weights: it decides the answers. Not what other tools, or runs, write beside it.
_READ = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# What else belongs to a model, and to other programs that read it; not every .json, which may be a run's.
_OTHERS = (
    "vocab.json",
    "merges.txt",
    "*_config.json",
    "*.index.json",
    "README.md",
    "LICENSE*",
    "*.jinja",
    "*.model",
    "*.py",
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx")


def model_fingerprint(directory: str | Path) -> str:
    """A digest (32 hexadecimal digits) of the files that are read of a model: configuration, tokenizer and weights.

    Raises:
        CheckpointError: the directory is absent or holds no model, or a file cannot be read.
    """
    root = Path(directory)
    digest = hashlib.blake2b(digest_size=16)
    try:
        small = sorted(path for pattern in _READ for path in root.glob(pattern) if path.is_file())
        files = [*small, *weight_files(root)]
        sampled = sum(path.stat().st_size > _WHOLE_BYTES for path in files)
        num_blocks = min(_MAX_BLOCKS_PER_FILE, max(_MIN_BLOCKS_PER_FILE, _MAX_BLOCKS // max(sampled, 1)))
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
            _add_content(digest, path, size, num_blocks)
    except OSError as error:
        raise CheckpointError(f"{error.filename or root}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def model_files(directory: str | Path) -> list[Path]:
    """The files of a model directory, those included that are not read here.

    Raises:
        OSError: the directory cannot be read.
    """
    root = Path(directory)
    found = {path for pattern in (*_READ, *_OTHERS, *_WEIGHTS) for path in root.glob(pattern) if path.is_file()}
    return sorted(found)


def _add_content(digest: hashlib.blake2b, path: Path, size: int, num_blocks: int) -> None:
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
            return
        digest.update(file.read(_HEADER_BYTES))
        for index in range(num_blocks):
            # Evenly spread, the last one at the very end.
            file.seek((size - _BLOCK_BYTES) * (index + 1) // num_blocks)
            digest.update(file.read(_BLOCK_BYTES))
