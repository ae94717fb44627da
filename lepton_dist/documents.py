"""YAML files whose every value remembers its line, so that an error can say where to look.

Floor 0, beside `errors`: plans, run files and cluster files all read through here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lepton_dist.errors import ConfigError
from lepton_dist.files import read_regular

_MOST_VALUES = 1_000_000  # a cluster file of 4,096 ranks holds a tenth of that


@dataclass(frozen=True)
class Document:
    """A parsed YAML file: plain `values`, and the line of every key path."""

    source: str
    values: Any
    lines: Mapping[str, int] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """``file:line`` of a key path, or of its nearest known ancestor."""
        while key and key not in self.lines:
            cut = max(key.rfind("."), key.rfind("["))
            key = key[:cut] if cut > 0 else ""
        return f"{self.source}:{self.lines[key]}" if key in self.lines else self.source

    def error(self, key: str, message: str) -> ConfigError:
        """The error to raise for a bad value at `key`."""
        return ConfigError(message, key=key, place=self.place(key))

    def located(self, error: ConfigError) -> ConfigError:
        """The same error with this document's file and line, when it has none yet."""
        if error.place:
            return error
        return ConfigError(error.message, key=error.key, place=self.place(error.key))


def read_yaml(path: str | Path) -> Document:
    """Read one YAML file.

    Raises:
        ConfigError: the file is absent, unreadable, not UTF-8, not YAML, or repeats a key.
    """
    try:
        text = read_regular(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text ({error.reason} at byte {error.start})", place=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", place=str(path)) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Document:
    """Parse YAML text; `source` is the name that errors show."""
    lines: dict[str, int] = {}
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            values = None if root is None else _build(loader, root, "", lines, source)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"is not valid YAML: {getattr(error, 'problem', None) or error}", place=place) from None
    except RecursionError:
        raise ConfigError("nests too deep, or an alias holds itself", place=source) from None
    return Document(source, values, lines)


def _build(loader: yaml.SafeLoader, node: yaml.Node, path: str, lines: dict[str, int], source: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > _MOST_VALUES:
        # Aliases of aliases grow without bound: a file of a kilobyte would fill the memory.
        raise ConfigError(f"holds more than {_MOST_VALUES} values", place=source)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            below = f"{path}.{key}" if path else key
            line = key_node.start_mark.line + 1
            if key in result:
                raise ConfigError("is given twice", key=below, place=f"{source}:{line}")
            lines[below] = line
            result[key] = _build(loader, value_node, below, lines, source)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, f"{path}[{index}]", lines, source) for index, item in enumerate(node.value)]
    try:
        return loader.construct_object(node, deep=True)
    except ValueError as error:  # such as the 30th of February, or a number of 5,000 digits
        raise ConfigError(f"is no value: {error}", key=path, place=f"{source}:{node.start_mark.line + 1}") from None
