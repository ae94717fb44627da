"""What a transport offers to a group, and a fabric to a world. Nothing here knows MPI.

A transport moves the tensors of one group; an algorithm is how it composes a collective. The operations take
torch tensors and may finish on a device's stream rather than before they return, so a transport over NCCL fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import torch
from torch import Tensor

AllReduceRoutine = Callable[[Tensor], None]


class Handle(Protocol):
    """A send or receive under way. It keeps the buffer alive."""

    def test(self) -> bool:
        """Whether it is complete; makes progress."""
        ...

    def wait(self) -> None:
        """Return when it is complete.

        Raises:
            RankLostError: the deadline has passed.
        """
        ...


class DoneHandle:
    """A handle of something that was complete at once."""

    def test(self) -> bool:
        """Always true."""
        return True

    def wait(self) -> None:
        """Returns at once."""


class Transport(Protocol):
    """The collectives of one group of two or more ranks.

    The group has checked dtypes and shapes; tensors are contiguous, have at least one element, and the same shape on
    every rank. Reductions combine in rank order and give the same bits on every rank.
    """

    name: str
    algorithms: Mapping[str, tuple[str, ...]]  # operation -> algorithms; only all_reduce has a choice today

    def all_reduce(self, shape: Sequence[int], dtype: torch.dtype, op: str, algorithm: str) -> AllReduceRoutine:
        """A routine that reduces tensors of this shape in place. The group keeps it: the hot path looks up nothing."""
        ...

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """`tensor` [*shape] of each rank -> `out` [size, *shape]."""
        ...

    def reduce_scatter(self, out: Tensor, tensor: Tensor, op: str) -> None:
        """`tensor` [size, *rest] -> `out` [*rest], the reduction of row `rank` of every rank."""
        ...

    def all_to_all(self, out: Tensor, tensor: Tensor) -> None:
        """Row i of `tensor` [size, *rest] goes to rank i; row i of `out` [size, *rest] came from rank i."""
        ...

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """`tensor` of rank `root` to all, in place."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called it."""
        ...


class PointToPoint(Protocol):
    """Messages between two ranks of a group. Those with one tag between one pair arrive in the order of sending."""

    def isend(self, tensor: Tensor, to: int, tag: int) -> Handle:
        """Start sending a contiguous tensor to group rank `to`."""
        ...

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Handle:
        """Start receiving into a contiguous tensor from group rank `source`."""
        ...


@dataclass(frozen=True)
class Links:
    """What connects the members of a group: transports by name, and notices that `doctor` shows.

    `takes_gpu_tensors` says that its messages may lie in a GPU's memory.
    """

    transports: Mapping[str, Transport] = field(default_factory=dict)
    messages: PointToPoint | None = None
    notices: tuple[str, ...] = ()
    takes_gpu_tensors: bool = False


class Post(Protocol):
    """The carrier of one mailbox: byte strings between any two ranks of the world."""

    def send(self, to: int, payload: bytes) -> None:
        """Start sending; never waits for the receiver."""
        ...

    def poll(self) -> tuple[int, bytes] | None:
        """The next message and its sender, or None."""
        ...

    def has_unsent(self) -> bool:
        """Whether sends are still under way; makes progress on them."""
        ...


class Fabric(Protocol):
    """What a world stands on: threads of this process, or MPI.

    `serves_any_thread` says that calls may come from one thread and then from another, if never from two at a time.
    """

    serves_any_thread: bool

    def connect(self, members: Sequence[int], name: str) -> Links:
        """Join `members` (two or more world ranks, this one among them); collective over them."""
        ...

    def post(self, name: str) -> Post:
        """Open a mailbox's carrier; collective over the world."""
        ...

    def abort(self, code: int) -> NoReturn:
        """End every process of the job."""
        ...

    def close(self, code: int) -> None:
        """Leave in good order; collective over the world."""
        ...
