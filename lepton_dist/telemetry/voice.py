"""What the job tells its user on stderr, once: notices and errors. A stream that fails is no reason to stop."""

from __future__ import annotations

import contextlib
import sys


def notice(text: str) -> None:
    """Tell the user something that is no error."""
    _say(f"lepton-dist: {text}")


def report(error: BaseException) -> None:
    """Print an error the way users see it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    _say(f"lepton-dist: error: {error}")


def _say(line: str) -> None:
    if sys.stderr is not None:  # None in a process that was started without one
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
