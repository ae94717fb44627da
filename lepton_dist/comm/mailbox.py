"""A mailbox: small control messages between any two ranks of the world. Sending never waits for the receiver."""

from __future__ import annotations

from collections import deque

from lepton_dist.comm.patience import Patience
from lepton_dist.comm.transport import Post
from lepton_dist.comm.wait import wait_until


class Mailbox:
    """Byte strings by world rank. Messages from one rank to another arrive in the order of sending."""

    def __init__(self, name: str, size: int, post: Post, patience: Patience) -> None:
        self.name = name
        self._size = size
        self._post = post
        self._patience = patience
        self._early: deque[tuple[int, bytes]] = deque()  # what came in while `flush` waited

    def send(self, to: int, payload: bytes) -> None:
        """Start sending `payload` to world rank `to`, which may be this one. Later polls drive it on.

        Raises:
            ValueError: the world has no rank `to`.
        """
        if not 0 <= to < self._size:
            raise ValueError(f"mailbox {self.name!r}: there is no rank {to} in a world of {self._size}")
        self._post.send(to, payload)

    def poll(self) -> tuple[int, bytes] | None:
        """The next message as (sender's world rank, payload), or None when there is none now."""
        return self._early.popleft() if self._early else self._post.poll()

    def flush(self) -> None:
        """Return when every message sent so far has left this rank. What comes in meanwhile is kept for `poll`.

        Raises:
            RankLostError: the deadline has passed, because a receiver takes no messages.
        """
        wait_until(
            self._is_flushed,
            self._patience,
            lambda: f"the sends of mailbox {self.name!r} to complete",
        )

    def _is_flushed(self) -> bool:
        # A large message moves only while its receiver takes it: two ranks that flush to each other must both do so.
        while (message := self._post.poll()) is not None:
            self._early.append(message)
        return not self._post.has_unsent()
