"""Workload files: lengths of requests, a JSON line each or many alike.

A file of JSON lines, each ``{"prompt_tokens": 100, "output_tokens": 50}`` with, if wanted, `max_tokens` (by default the
output's length is known beforehand), `arrival_s` (0) and `count` (1).
"""

from __future__ import annotations

import math
import os
from typing import Any

import msgspec

from lepton_dist.coordinator.workload import RequestLengths
from lepton_dist.errors import ConfigError
from lepton_dist.files import read_regular

_MOST_ALIKE = 10_000_000  # requests of a line, each of which takes memory


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    prompt_tokens: int
    output_tokens: int
    max_tokens: int | None = None
    arrival_s: float = 0.0
    count: int = 1


def read_workload(path: str | os.PathLike[str]) -> list[RequestLengths]:
    """The requests of a workload file, by arrival.

    Raises:
        ConfigError: the file cannot be read, a line is wrong, or there is no request in it.
    """
    decoder = msgspec.json.Decoder(_Line)
    requests: list[RequestLengths] = []
    try:
        lines = read_regular(path).splitlines()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", place=str(path)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"is no request of a workload: {error}", place=f"{path}:{number}") from None
        requests += [_checked(fields, f"{path}:{number}")] * fields.count
    if not requests:
        raise ConfigError(
            'holds no request: write lines such as {"prompt_tokens": 100, "output_tokens": 50}', place=str(path)
        )
    return sorted(requests, key=lambda request: request.arrival_s)


def _checked(fields: _Line, place: str) -> RequestLengths:
    most = fields.output_tokens if fields.max_tokens is None else fields.max_tokens
    wrong: dict[str, Any] = {
        name: value
        for name, value in (("prompt_tokens", fields.prompt_tokens), ("output_tokens", fields.output_tokens))
        if value < 1
    }
    if wrong:
        name, value = next(iter(wrong.items()))
        raise ConfigError(f"must be at least 1, not {value}", key=name, place=place)
    if most < fields.output_tokens:
        raise ConfigError(
            f"is {most}, but output_tokens is {fields.output_tokens}: raise it", key="max_tokens", place=place
        )
    if not 0 <= fields.arrival_s < math.inf:  # not a number is neither
        raise ConfigError(f"must be 0 seconds or more, not {fields.arrival_s}", key="arrival_s", place=place)
    if not 1 <= fields.count <= _MOST_ALIKE:
        raise ConfigError(f"must be from 1 to {_MOST_ALIKE}, not {fields.count}", key="count", place=place)
    return RequestLengths(fields.prompt_tokens, fields.output_tokens, most, fields.arrival_s)
