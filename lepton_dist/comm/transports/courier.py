"""Messages that start when the GPU has come to them, without stopping their rank until then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lepton_dist.comm.patience import Patience
from lepton_dist.comm.transport import Handle
from lepton_dist.comm.wait import wait_until


class Courier:
    """The messages of this process that wait for its GPU. One for all groups: any wait moves all of them on."""

    def __init__(self) -> None:
        self._waiting: deque[LateMessage] = deque()

    def add(self, message: LateMessage) -> None:
        """Drive a message on until it has started."""
        self._waiting.append(message)
        self.progress()

    def progress(self) -> bool:
        """Start every message that the GPU has come to, in their order; whether some are still waiting."""
        while self._waiting and self._waiting[0].start():
            self._waiting.popleft()
        return bool(self._waiting)


class LateMessage:
    """A message that `begin` starts when `is_ready`; both wait for nothing."""

    def __init__(
        self,
        what: str,
        is_ready: Callable[[], bool],
        begin: Callable[[], Handle],
        courier: Courier,
        patience: Patience,
    ) -> None:
        self._what, self._is_ready, self._begin = what, is_ready, begin
        self._courier, self._patience = courier, patience
        self._inner: Handle | None = None
        courier.add(self)

    def start(self) -> bool:
        """Start it if the GPU has come to it; whether it has started."""
        if self._inner is None and self._is_ready():
            self._inner = self._begin()
        return self._inner is not None

    def test(self) -> bool:
        """See `Handle`."""
        self._courier.progress()
        return self._inner is not None and self._inner.test()

    def wait(self) -> None:
        """See `Handle`."""

        def has_started() -> bool:
            self._courier.progress()
            return self._inner is not None

        wait_until(has_started, self._patience, lambda: f"the GPU to come to {self._what}")
        if self._inner is not None:
            self._inner.wait()
