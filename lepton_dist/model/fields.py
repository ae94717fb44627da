"""Typed reading of a checkpoint's config.json, with errors that name the file and the key."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lepton_dist.checkpoint_files import read_json_object
from lepton_dist.errors import CheckpointError

_MOST = 2**31 - 1
_MOST_LAYERS = 1 << 14
_DTYPES = ("float32", "bfloat16", "float16")


class ConfigFields:
    """The values of a config.json, or of a mapping in it, whose key is then the `prefix` of its keys."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self._prefix = prefix

    @staticmethod
    def read(directory: str | Path) -> ConfigFields:
        """Read ``config.json``.

        Raises:
            CheckpointError: it is absent or not a JSON object.
        """
        if not Path(directory).is_dir():
            raise CheckpointError(
                f"{directory}: is not a directory: --model takes a checkpoint directory with config.json"
            )
        return ConfigFields.read_file(Path(directory) / "config.json")

    @staticmethod
    def read_file(path: Path) -> ConfigFields:
        """Read any JSON file that holds an object."""
        return ConfigFields(path, read_json_object(path))

    def error(self, key: str, message: str) -> CheckpointError:
        """The error to raise for a bad value."""
        return CheckpointError(f"{self.path}: {self._prefix}{key}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; an explicit null counts as absent."""
        value = self.values.get(key)
        return default if value is None else value

    def mapping(self, key: str) -> ConfigFields | None:
        """The values of a mapping; None where it is absent or empty."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"must be a mapping, not {reprlib.repr(value)}")
        return ConfigFields(self.path, value, f"{self._prefix}{key}.") if value else None

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        """A whole number from `least` to `most`; an error when it is absent without a default."""
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"must be a whole number of at least {least}, not {reprlib.repr(value)}")
        if value > most:
            raise self.error(key, f"must be a whole number of at most {most}, not {reprlib.repr(value)}")
        return value

    def layers(self, key: str, default: int | None = None) -> int:
        """The number of layers."""
        return self.integer(key, default, most=_MOST_LAYERS)

    def number(self, key: str, default: float | None = None, *, above: float = -math.inf, most: float = 1e30) -> float:
        """A number above `above`, at most `most`; an error when it is absent without a default."""
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, not {reprlib.repr(value)}")
        if not above < value <= most or value < -most:  # false for what is no number, too
            low = f"above {above:g}" if above > -math.inf else f"from {-most:g}"
            raise self.error(key, f"must be a number {low}, at most {most:g}, not {reprlib.repr(value)}")
        return float(value)

    def numbers(self, key: str, count: int, *, above: float) -> list[float]:
        """So many numbers above `above`."""
        values = self.get(key)
        if values is None:
            raise self.error(key, "is missing")
        if not isinstance(values, list) or len(values) != count:
            number = f"{len(values)} entries" if isinstance(values, list) else reprlib.repr(values)
            raise self.error(key, f"must be a list of {count} numbers, not {number}")
        items = ConfigFields(self.path, {str(place): value for place, value in enumerate(values)}, f"{key}.")
        return [items.number(place, above=above) for place in items.values]

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {reprlib.repr(value)}")
        return value

    def choice(self, key: str, default: str, known: Mapping[str, str]) -> str:
        """One of `known`, translated to our own name for it."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in known:
            raise self.error(key, f"{reprlib.repr(value)} is not supported; known: {', '.join(known)}")
        return known[value]

    def token_ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """A token id, a list of them, or nothing; `default` where the key is absent, but not where it is null."""
        value = self.values.get(key, default)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _MOST for item in listed):
            raise self.error(key, f"must be a token id (a whole number) or a list of them, not {reprlib.repr(value)}")
        return tuple(listed)

    def dtype(self) -> str:
        """The dtype (``dtype``, formerly ``torch_dtype``); "" where it is that of the weights."""
        key = "dtype" if self.get("dtype") is not None else "torch_dtype"
        value = self.get(key, "auto")
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name == "auto":
            return ""
        if name not in _DTYPES:
            raise self.error(key, f"{reprlib.repr(value)} is not supported; known: auto, {', '.join(_DTYPES)}")
        return str(name)
