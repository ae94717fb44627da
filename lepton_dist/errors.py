"""What can go wrong, as one tree; every branch knows the exit code of the process.

LeptonError                     70  a fault of ours or of the machine
  UsageError                     2  the command or a file is wrong; says what to change
    ConfigError                     a YAML file: names file, line and key
    CheckpointError                 a model directory: config, weights, tokenizer
    LaunchError                     started by the wrong launcher, or on the wrong number of ranks
    MissingExtraError               an optional dependency is needed; names the extra
    OutputError                     the output cannot be written, or belongs to another run
  RequestError                   3  one input row is wrong; the others go on
  StoppedEarly                  75  stopped by a signal or a full disk; start again to resume
  RankLostError                 70  a rank died, is wedged, or did not answer before a deadline
  GradientError                 70  autograd asks for a gradient of what has none; a TypeError too
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_ROW_ERRORS = 3
EXIT_FAILED = 70
EXIT_STOPPED = 75


class LeptonError(Exception):
    """The root: a fault that is not the user's."""

    exit_code = EXIT_FAILED


class UsageError(LeptonError):
    """The command line or a file it names is wrong."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A YAML file is wrong.

    `key` is the path to the value, such as ``replicas[0].stages[1].layers``; `place` is ``file:line`` when known.
    """

    def __init__(self, message: str, *, key: str = "", place: str = "") -> None:
        self.message, self.key, self.place = message, key, place
        super().__init__(": ".join(part for part in (place, key, message) if part))


class CheckpointError(UsageError):
    """A model directory is incomplete or holds something unexpected."""


class LaunchError(UsageError):
    """The job was started in a way that cannot work."""


class MissingExtraError(UsageError):
    """An optional dependency is missing."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'lepton-dist[{extra}]'")


class OutputError(UsageError):
    """The output file cannot be used."""


class RequestError(LeptonError):
    """One request is wrong. `kind` is the error type that its output row carries."""

    exit_code = EXIT_ROW_ERRORS

    def __init__(self, message: str, *, kind: str = "invalid_request_error") -> None:
        self.kind = kind
        super().__init__(message)


class StoppedEarly(LeptonError):
    """The job stopped before its end and can be resumed."""

    exit_code = EXIT_STOPPED


class RankLostError(LeptonError):
    """A rank died, is wedged, or did not answer before its deadline."""


class GradientError(LeptonError, TypeError):
    """A tensor requires a gradient, and what it is given to cannot pass one on."""
