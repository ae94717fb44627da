"""Typed reading of a checkpoint's config.json, with errors that name the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lepton_dist.checkpoint_files import read_json_object
from lepton_dist.errors import CheckpointError


class ConfigFields:
    """The values of a config.json."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    @staticmethod
    def read(directory: str | Path) -> ConfigFields:
        """Read ``config.json``.

        Raises:
            CheckpointError: it is absent or not a JSON mapping.
        """
        if not Path(directory).is_dir():
            raise CheckpointError(
                f"{directory}: is not a directory: --model takes a checkpoint directory with config.json"
            )
        return ConfigFields.read_file(Path(directory) / "config.json")

    @staticmethod
    def read_file(path: Path) -> ConfigFields:
        """Read any JSON file that holds a mapping."""
        return ConfigFields(path, read_json_object(path))

    def error(self, key: str, message: str) -> CheckpointError:
        """The error to raise for a bad value."""
        return CheckpointError(f"{self.path}: {key}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; an explicit null counts as absent."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`; an error when it is absent without a default."""
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"must be a whole number of at least {least}, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def choice(self, key: str, default: str, known: Mapping[str, str]) -> str:
        """One of `known`, translated to our own name for it."""
        value = self.get(key, default)
        if value not in known:
            raise self.error(key, f"{value!r} is not supported; known: {', '.join(known)}")
        return known[value]

    def integers(self, key: str) -> tuple[int, ...]:
        """A number, a list of numbers, or nothing."""
        value = self.get(key, [])
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
            raise self.error(key, f"must be a whole number or a list of them, not {value!r}")
        return tuple(listed)

    def dtype(self) -> str:
        """The checkpoint's dtype by its config (``dtype``, formerly ``torch_dtype``)."""
        value = self.get("dtype", self.get("torch_dtype", "float32"))
        if value not in ("float32", "bfloat16", "float16"):
            raise self.error("dtype", f"{value!r} is not supported; known: float32, bfloat16, float16")
        return str(value)
