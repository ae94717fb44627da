"""The local transport: ranks are threads of one process that meet at a hub. For unit tests, and for a world of one."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lepton_dist.comm.patience import Patience
from lepton_dist.comm.tensors import Scratch, accumulates_in, empty, needs_scratch, reduce_rows
from lepton_dist.comm.transport import AllReduceRoutine, DoneHandle, Handle, Links
from lepton_dist.errors import RankLostError


class Hub:
    """Where the threads of one local world meet. Everything in it is guarded by one condition."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._meetings: dict[Hashable, dict[int, Any]] = {}
        self._left: dict[Hashable, int] = {}
        self._letters: dict[Hashable, deque[Tensor]] = {}
        self._receives: dict[Hashable, deque[_Receive]] = {}
        self._posts: dict[Hashable, deque[tuple[int, bytes]]] = {}
        self._is_stopped = False

    def stop(self) -> None:
        """Release every thread that waits, now or later, with a `RankLostError`."""
        with self.changed:
            self._is_stopped = True
            self.changed.notify_all()

    def wait(self, ready: Callable[[], bool], patience: Patience, what: Callable[[], str]) -> None:
        """Wait, holding `changed`, until `ready()`.

        Raises:
            RankLostError: the deadline has passed, or another thread of the world failed.
        """
        self.changed.wait_for(lambda: self._is_stopped or ready(), timeout=patience.seconds)
        if ready():
            return
        if self._is_stopped:
            raise RankLostError(f"while {patience.phase}: another rank of this process failed, so this one stops too")
        raise RankLostError(f"while {patience.phase}: waited {patience.seconds:g} s for {what()}")

    def meet(self, key: Hashable, rank: int, value: Any, members: Sequence[int], patience: Patience, what: str) -> Any:
        """Leave `value` under this group rank and return the values of all, in rank order, when all have come."""
        size = len(members)
        with self.changed:
            values = self._meetings.setdefault(key, {})
            values[rank] = value
            self.changed.notify_all()

            def describe() -> str:
                missing = ", ".join(f"rank {members[i]}" for i in range(size) if i not in values)
                return f"{what}; not arrived: {missing} (threads of this process)"

            self.wait(lambda: len(values) == size, patience, describe)
            self._left[key] = self._left.get(key, 0) + 1
            if self._left[key] == size:
                del self._left[key], self._meetings[key]
            return [values[i] for i in range(size)]

    def send(self, key: Hashable, tensor: Tensor) -> None:
        """Leave a copy of `tensor` for the next receive of this key."""
        with self.changed:
            self._letters.setdefault(key, deque()).append(tensor.clone())
            self._match(key)

    def receive(self, key: Hashable, receive: _Receive) -> None:
        """Post a receive; those of one key are filled in the order of posting."""
        with self.changed:
            self._receives.setdefault(key, deque()).append(receive)
            self._match(key)

    def post_box(self, key: Hashable) -> deque[tuple[int, bytes]]:
        """The queue of (sender, payload) for one reader of one mailbox."""
        with self.changed:
            return self._posts.setdefault(key, deque())

    def _match(self, key: Hashable) -> None:
        letters, receives = self._letters.get(key), self._receives.get(key)
        while letters and receives:
            receives.popleft().fill(letters.popleft())
        self.changed.notify_all()


class _Receive:
    """The handle of a receive."""

    def __init__(self, hub: Hub, buffer: Tensor, patience: Patience, what: str) -> None:
        self._hub, self._buffer, self._patience, self._what = hub, buffer, patience, what
        self._letter: Tensor | None = None
        self._is_done = False

    def fill(self, letter: Tensor) -> None:
        """The message is here; the receiving thread copies it, so that its own thread writes its tensors."""
        self._letter = letter

    def test(self) -> bool:
        """Whether the message is in the buffer."""
        if not self._is_done and self._letter is not None:
            self._buffer.view(-1).copy_(self._letter.view(-1))
            self._letter, self._is_done = None, True
        return self._is_done

    def wait(self) -> None:
        """Return when the message is in the buffer."""
        with self._hub.changed:
            self._hub.wait(self.test, self._patience, lambda: self._what)


class LocalTransport:
    """The collectives of one group of threads."""

    name = "local"

    def __init__(self, hub: Hub, key: Hashable, members: Sequence[int], rank: int, name: str, patience: Patience):
        self.algorithms: Mapping[str, tuple[str, ...]] = {}
        self._hub, self._key, self._members, self._rank = hub, key, tuple(members), rank
        self._group_name, self._patience = name, patience
        self._number = 0
        self._wide = Scratch()

    def all_reduce(self, shape: Sequence[int], dtype: torch.dtype, op: str, algorithm: str) -> AllReduceRoutine:
        """A routine that reduces tensors of this shape in place."""
        is_widened = needs_scratch(dtype, op, len(self._members))

        def routine(tensor: Tensor) -> None:
            scratch = self._wide.take(shape, accumulates_in(dtype)) if is_widened else None
            reduce_rows(self._exchange(tensor.clone(), "all_reduce"), op, tensor, scratch)

        return routine

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`."""
        for row, value in zip(out, self._exchange(tensor.clone(), "all_gather"), strict=True):
            row.copy_(value)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, op: str) -> None:
        """See `Transport`."""
        rows = [value[self._rank] for value in self._exchange(tensor.clone(), "reduce_scatter")]
        is_needed = needs_scratch(out.dtype, op, len(rows))
        reduce_rows(rows, op, out, empty(out.shape, accumulates_in(out.dtype)) if is_needed else None)

    def all_to_all(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`."""
        for row, value in zip(out, self._exchange(tensor.clone(), "all_to_all"), strict=True):
            row.copy_(value[self._rank])

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """See `Transport`."""
        value = self._exchange(tensor.clone() if self._rank == root else None, "broadcast")[root]
        if self._rank != root:
            tensor.copy_(value)

    def barrier(self) -> None:
        """See `Transport`."""
        self._exchange(None, "barrier")

    def isend(self, tensor: Tensor, to: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        self._hub.send((self._key, self._rank, to, tag), tensor)
        return DoneHandle()

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        what = f"irecv with tag {tag} in group {self._group_name!r} from rank {self._members[source]}"
        handle = _Receive(self._hub, tensor, self._patience, what)
        self._hub.receive((self._key, source, self._rank, tag), handle)
        return handle

    def _exchange(self, value: Any, operation: str) -> Any:
        self._number += 1
        what = f"{operation} number {self._number} of group {self._group_name!r}"
        key = (self._key, self._number)
        return self._hub.meet(key, self._rank, value, self._members, self._patience, what)


class LocalPost:
    """The carrier of a mailbox between threads."""

    def __init__(self, hub: Hub, key: Hashable, rank: int) -> None:
        self._hub, self._key, self._rank = hub, key, rank
        self._incoming = hub.post_box((key, rank))

    def send(self, to: int, payload: bytes) -> None:
        """See `Post`."""
        self._hub.post_box((self._key, to)).append((self._rank, bytes(payload)))

    def poll(self) -> tuple[int, bytes] | None:
        """See `Post`."""
        return self._incoming.popleft() if self._incoming else None

    def has_unsent(self) -> bool:
        """Never: sending is delivery."""
        return False


class LocalFabric:
    """What one thread's world stands on."""

    def __init__(self, hub: Hub, rank: int, patience: Patience) -> None:
        self._hub, self._rank, self._patience = hub, rank, patience
        self._opened: dict[Hashable, int] = {}
        self.serves_any_thread = True

    def connect(self, members: Sequence[int], name: str) -> Links:
        """See `Fabric`."""
        key = self._key(("group", name, *members))
        rank = list(members).index(self._rank)
        self._hub.meet(key, rank, None, members, self._patience, f"the opening of group {name!r}")
        transport = LocalTransport(self._hub, key, members, rank, name, self._patience)
        return Links({"local": transport}, transport)

    def post(self, name: str) -> LocalPost:
        """See `Fabric`."""
        return LocalPost(self._hub, self._key(("mailbox", name)), self._rank)

    def abort(self, code: int) -> NoReturn:
        """See `Fabric`."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def close(self, code: int) -> None:
        """Nothing to give back."""

    def _key(self, base: tuple[Hashable, ...]) -> Hashable:
        # The same name may be opened again: count, so that the second opening is another group on every thread.
        self._opened[base] = self._opened.get(base, 0) + 1
        return (*base, self._opened[base])
