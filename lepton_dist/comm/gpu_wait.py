"""Waiting for the GPU without hanging: a kernel of a collective whose peer died never ends by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lepton_dist.comm.patience import Patience
from lepton_dist.comm.wait import wait_until
from lepton_dist.errors import RankLostError


class Breakable(Protocol):
    """A link to other ranks that may break while the GPU works."""

    def failure(self) -> str:
        """What is wrong with it, in words; empty when nothing is."""
        ...

    def abort(self) -> None:
        """Take its work off the GPU."""
        ...


class GpuWait:
    """Waits for events of the GPU while it watches the links that its work goes through."""

    def __init__(self, patience: Patience, describe: str, idle: Callable[[], object]) -> None:
        """`describe` names this rank's GPU in errors; `idle` is called while there is nothing to do but to wait."""
        self._patience, self._describe, self._idle = patience, describe, idle
        self._links: list[Breakable] = []

    def watch(self, links: Sequence[Breakable]) -> None:
        """Ask these links too."""
        self._links.extend(links)

    def until(self, event: torch.cuda.Event, what: str) -> None:
        """Return when the GPU has come to `event`.

        Raises:
            RankLostError: a link is broken, or the deadline has passed. The links are aborted then.
        """
        try:
            wait_until(
                lambda: self._is_past(event), self._patience, lambda: f"{self._describe} to end {what}", self._idle
            )
        except RankLostError:
            for link in self._links:
                link.abort()
            raise

    def _is_past(self, event: torch.cuda.Event) -> bool:
        if event.query():
            return True
        for link in self._links:
            failure = link.failure()
            if failure:
                raise RankLostError(f"while {self._patience.phase}: {failure}")
        return False
