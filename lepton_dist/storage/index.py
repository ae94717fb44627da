"""The index of a safetensors checkpoint, built from the headers alone. Without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lepton_dist.checkpoint_files import read_json_object
from lepton_dist.errors import CheckpointError
from lepton_dist.storage.safetensors_header import StoredTensor, read_header

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


class PackedIndex(msgspec.Struct, array_like=True):
    """An index on its way to another rank: files by name, and for each of them its tensors."""

    files: list[str]
    tensors: list[list[tuple[str, str, list[int], int, int]]]


class CheckpointIndex:
    """All tensors of a checkpoint directory by name."""

    def __init__(self, directory: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.directory = directory
        self.tensors = tensors

    @staticmethod
    def read(directory: str | Path) -> CheckpointIndex:
        """Read the headers of every weight file, once.

        Like transformers, it takes ``model.safetensors`` where there is one, and else the files that
        ``model.safetensors.index.json`` names, each tensor from the file that it is said to be in.

        Raises:
            CheckpointError: no weights, a file of the index is missing, a file is truncated or malformed, or a tensor
                is in two files and no index says in which.
        """
        root = Path(directory)
        if not root.is_dir():
            raise CheckpointError(f"{root}: is not a directory: --model takes a checkpoint directory with config.json")
        files, places = _weight_files(root)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            for tensor in read_header(file):
                if places.get(tensor.name, file.name) != file.name:
                    continue
                if tensor.name in tensors:
                    other = tensors[tensor.name].file
                    raise CheckpointError(f"{root}: {tensor.name!r} is in {other.name} and in {file.name}: remove one")
                tensors[tensor.name] = tensor
        return CheckpointIndex(root, tensors)

    def packed(self) -> PackedIndex:
        """The index in a form that can be sent."""
        by_file: dict[str, list[tuple[str, str, list[int], int, int]]] = {}
        for one in self.tensors.values():
            entry = (one.name, one.dtype, list(one.shape), one.offset, one.num_bytes)
            by_file.setdefault(one.file.name, []).append(entry)
        return PackedIndex(list(by_file), list(by_file.values()))

    @staticmethod
    def unpacked(directory: str | Path, packed: PackedIndex) -> CheckpointIndex:
        """The index of a directory as another rank has read it."""
        root = Path(directory)
        tensors: dict[str, StoredTensor] = {}
        for name, entries in zip(packed.files, packed.tensors, strict=True):
            file = root / name
            for key, dtype, shape, offset, num_bytes in entries:
                tensors[key] = StoredTensor(key, file, dtype, tuple(shape), offset, num_bytes)
        return CheckpointIndex(root, tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def main_dtype(self, known: Iterable[str]) -> str | None:
        """The dtype, one of those known, that most of the bytes are in; None where there is none."""
        amounts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            amounts[tensor.dtype] += tensor.num_bytes
        return max(known, key=lambda dtype: amounts[dtype]) if any(amounts[dtype] for dtype in known) else None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: the weights lack the tensor {name!r}") from None


def weight_files(directory: str | Path) -> list[Path]:
    """The files that a checkpoint's weights are read from, and the index that names them, where one does.

    Raises:
        CheckpointError: as `CheckpointIndex.read`, as far as it can be told without the headers.
    """
    root = Path(directory)
    files, places = _weight_files(root)
    return [*([root / _INDEX_NAME] if places else []), *files]


def _weight_files(root: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The weight files, and by tensor the file that it is taken from, where an index says so."""
    if (root / _SINGLE_NAME).is_file():  # what else lies there may be an adapter, or the index of what it was made from
        return [root / _SINGLE_NAME], {}
    index_path = root / _INDEX_NAME
    if index_path.is_file():
        places = _places(index_path)
        names = sorted(set(places.values()))
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{root}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:3])}"
            )
        return [root / name for name in names], places
    files = sorted(path for path in root.glob("*.safetensors") if path.is_file())
    if not files:
        hint = (
            " (pickled .bin weights are never loaded: convert them to safetensors)" if any(root.glob("*.bin")) else ""
        )
        raise CheckpointError(f"{root}: holds no *.safetensors file{hint}")
    return files, {}


def _places(index_path: Path) -> dict[str, str]:
    places: Any = read_json_object(index_path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index_path}: is not a safetensors index: weight_map must map tensors to files")
    for name in sorted(set(places.values())):
        if Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{index_path}: names the weight file {name!r} outside its directory")
    return places
