"""A group: the ranks of one collective. Everyone above this room communicates through it.

A group of one returns its input untouched and never meets a transport, so no caller asks how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lepton_dist.comm.select import Choice, Table, default_table
from lepton_dist.comm.tensors import ReduceOp, check_movable, check_reducible
from lepton_dist.comm.transport import AllReduceRoutine, Handle, Links, PointToPoint, Transport
from lepton_dist.errors import GradientError

# Routines that are kept, one for each (dtype, shape, op); beyond this many shapes they are made anew.
_MAX_ROUTINES = 512
MAX_TAG = 8191


class Group:
    """An ordered set of world ranks, of which this process is one.

    Tensors are of the dtypes in `comm.tensors.SUPPORTED`: on the CPU, or on a GPU once `serve_gpu` has said what
    carries them. Every member calls the same operations in the same order, with tensors of the same shape and dtype.
    Reductions combine in the order of ranks (NCCL's in its own), keep sums of 16-bit floats in float32 and round once,
    and give the same bits on every rank. Every wait ends with a `RankLostError` when the world's patience is over.
    Autograd does not see through them: a tensor that requires a gradient is refused with a `GradientError`.
    `num_nodes` counts the nodes that the members lie on.
    """

    def __init__(self, name: str, members: Sequence[int], rank: int, links: Links, num_nodes: int = 1) -> None:
        self.name = name
        self.num_nodes = num_nodes
        self.members = tuple(members)
        self.rank = rank
        self.size = len(self.members)
        self.notices = links.notices
        self._messages, self._takes_gpu_tensors = links.messages, links.takes_gpu_tensors
        self._transports = dict(links.transports)
        self._routines: dict[tuple[torch.dtype, torch.Size, str], AllReduceRoutine] = {}
        self._table: Table | None = default_table(self._transports) if self._transports else None
        self._gpu: Transport | None = None
        self._gpu_messages: PointToPoint | None = None

    def serve_gpu(self, transport: Transport, messages: PointToPoint) -> None:
        """Carry this rank's GPU tensors too. Members may differ: what a CPU rank sends, a GPU rank may receive."""
        self._gpu, self._gpu_messages = transport, messages

    @property
    def gpu_messages(self) -> PointToPoint | None:
        """What carries messages that lie in GPU memory as they are: CUDA-aware MPI; None where that is not there."""
        return self._messages if self._takes_gpu_tensors else None

    @property
    def gpu_transport(self) -> str | None:
        """The name of what carries GPU tensors; None where nothing does, or the group has one rank."""
        return None if self._gpu is None else self._gpu.name

    @property
    def table(self) -> Table | None:
        """Which transport and algorithm carry what; None for a group of one."""
        return self._table

    def use_table(self, table: Table) -> None:
        """Choose by `table` from now on. Collective in effect: every member must use the same table."""
        self._table = table
        self._routines.clear()

    @property
    def transports(self) -> tuple[str, ...]:
        """Names of the transports that join the members; none for a group of one."""
        return tuple(self._transports)

    def choices(self, operation: str) -> list[Choice]:
        """Every way in which this group could carry `operation`, in an order that is the same on all ranks."""
        return [
            Choice(name, algorithm)
            for name in sorted(self._transports)
            for algorithm in self._transports[name].algorithms.get(operation, ("direct",))
        ]

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Reduce `tensor` [any shape] over the members, in place; returns it.

        Raises:
            TypeError: a dtype or device that cannot be carried, or reduced.
            RankLostError: a member did not arrive before the deadline.
        """
        if self.size == 1:
            return tensor
        _refuse_gradient(tensor, "all_reduce")
        shape = tensor.shape
        if not tensor.is_cpu:
            routine = self._gpu_all_reduce_routine(tensor, op)
        else:
            found = self._routines.get((tensor.dtype, shape, op))
            routine = self._all_reduce_routine(tensor, op) if found is None else found
        if tensor.is_contiguous() and not tensor.requires_grad:
            routine(tensor)
            return tensor
        dense = tensor.detach().contiguous()
        routine(dense)
        if dense.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(dense)
        return tensor

    def _all_reduce_routine(self, tensor: Tensor, op: str) -> AllReduceRoutine:
        check_movable(tensor, "all_reduce")
        check_reducible(tensor.dtype, op, "all_reduce")
        if tensor.numel() == 0:
            return _nothing
        choice = self._choose("all_reduce", tensor.nbytes)
        transport = self._transports[choice.transport]
        routine = transport.all_reduce(tensor.shape, tensor.dtype, op, choice.algorithm)
        if len(self._routines) >= _MAX_ROUTINES:
            self._routines.clear()
        self._routines[tensor.dtype, tensor.shape, op] = routine
        return routine

    def _gpu_all_reduce_routine(self, tensor: Tensor, op: str) -> AllReduceRoutine:
        self._check_movable(tensor, "all_reduce")
        check_reducible(tensor.dtype, op, "all_reduce")
        if tensor.numel() == 0:
            return _nothing
        return self._carrier("all_reduce", tensor).all_reduce(tensor.shape, tensor.dtype, op, "direct")

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`tensor` [*shape] of every member -> a new tensor [size, *shape], in rank order.

        A group of one returns a view, `tensor.unsqueeze(0)`.

        Raises:
            TypeError: a dtype or device that cannot be carried.
            RankLostError: a member did not arrive before the deadline.
        """
        if self.size == 1:
            return tensor.unsqueeze(0)
        self._check_movable(tensor, "all_gather")
        out = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        if tensor.numel():
            self._carrier("all_gather", tensor).all_gather(out, tensor.detach().contiguous())
        return out

    def reduce_scatter(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """`tensor` [size, *rest] -> [*rest]: the reduction over all members of row `rank`.

        Raises:
            ValueError: the first dim is not the size of the group.
            TypeError: a dtype or device that cannot be carried, or reduced.
            RankLostError: a member did not arrive before the deadline.
        """
        self._check_rows(tensor, "reduce_scatter")
        if self.size == 1:
            return tensor[0]
        self._check_movable(tensor, "reduce_scatter")
        check_reducible(tensor.dtype, op, "reduce_scatter")
        out = torch.empty(tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        if tensor.numel():
            self._carrier("reduce_scatter", tensor).reduce_scatter(out, tensor.detach().contiguous(), op)
        return out

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """`tensor` [size, *rest] -> a new tensor [size, *rest]: row i went to member i, row j came from member j.

        Raises:
            ValueError: the first dim is not the size of the group.
            TypeError: a dtype or device that cannot be carried.
            RankLostError: a member did not arrive before the deadline.
        """
        self._check_rows(tensor, "all_to_all")
        if self.size == 1:
            return tensor
        self._check_movable(tensor, "all_to_all")
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if tensor.numel():
            self._carrier("all_to_all", tensor).all_to_all(out, tensor.detach().contiguous())
        return out

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Copy `tensor` of group rank `root` to all members, in place; returns it.

        Raises:
            ValueError: no member has the rank `root`.
            TypeError: a dtype or device that cannot be carried.
            RankLostError: a member did not arrive before the deadline.
        """
        self._check_rank(root, "root")
        if self.size == 1:
            return tensor
        self._check_movable(tensor, "broadcast")
        if tensor.numel():
            dense = tensor.detach().contiguous()
            self._carrier("broadcast", tensor).broadcast(dense, root)
            if dense.data_ptr() != tensor.data_ptr() and self.rank != root:
                tensor.detach().copy_(dense)
        return tensor

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Handle:
        """Start sending `tensor` to group rank `to`. Do not write to it before the handle is done.

        Raises:
            ValueError: `to` is this rank or no member; a tag outside 0..8191.
            TypeError: a dtype or device that cannot be carried.
        """
        self._check_peer(to, "to", tag)
        self._check_movable(tensor, "isend")
        return self._post(tensor).isend(tensor.detach().contiguous(), to, tag)

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Handle:
        """Start receiving into `tensor` from group rank `source`. Do not read it before the handle is done.

        Raises:
            ValueError: `source` is this rank or no member; a tag outside 0..8191; a tensor that is not contiguous.
            TypeError: a dtype or device that cannot be carried.
        """
        self._check_peer(source, "source", tag)
        self._check_movable(tensor, "irecv")
        if not tensor.is_contiguous():
            raise ValueError(
                f"irecv needs a contiguous tensor; this one has shape {tuple(tensor.shape)} and strides "
                f"{tensor.stride()}: receive into a contiguous one and copy"
            )
        return self._post(tensor).irecv(tensor.detach(), source, tag)

    def barrier(self) -> None:
        """Return when every member has called it.

        Raises:
            RankLostError: a member did not arrive before the deadline.
        """
        if self.size > 1:
            self._transports[self._choose("barrier", 0).transport].barrier()

    def _choose(self, operation: str, num_bytes: int) -> Choice:
        assert self._table is not None  # only a group of one has no table, and it never chooses
        return self._table.choose(operation, num_bytes)

    def _carrier(self, operation: str, tensor: Tensor) -> Transport:
        if self._gpu is not None and not tensor.is_cpu:
            return self._gpu
        return self._transports[self._choose(operation, tensor.nbytes).transport]

    def _post(self, tensor: Tensor) -> PointToPoint:
        messages = self._messages if tensor.is_cpu else self._gpu_messages
        assert messages is not None  # a group of one has no peer, and other devices were refused before
        return messages

    def _check_movable(self, tensor: Tensor, operation: str) -> None:
        _refuse_gradient(tensor, operation)
        check_movable(tensor, operation, has_gpu=self._gpu is not None)

    def _check_rows(self, tensor: Tensor, operation: str) -> None:
        if tensor.dim() == 0 or tensor.shape[0] != self.size:
            raise ValueError(
                f"{operation} in group {self.name!r} of {self.size} ranks needs a first dim of {self.size}; "
                f"the tensor has shape {tuple(tensor.shape)}"
            )

    def _check_rank(self, rank: int, what: str) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(
                f"{what}={rank} is not a rank of group {self.name!r}, which has {self.size} ranks from 0 on"
            )

    def _check_peer(self, rank: int, what: str, tag: int) -> None:
        self._check_rank(rank, what)
        if rank == self.rank:
            raise ValueError(f"{what}={rank} is this rank itself in group {self.name!r}: keep the tensor instead")
        if not 0 <= tag <= MAX_TAG:
            raise ValueError(f"tag {tag} is outside 0..{MAX_TAG}")


def _refuse_gradient(tensor: Tensor, operation: str) -> None:
    """What comes back would look like a constant to autograd."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise GradientError(
            f"{operation} passes no gradient on, and the tensor {tuple(tensor.shape)} requires one: call it within a "
            "torch.autograd.Function that has a backward, on tensor.detach(), or under torch.no_grad()"
        )


def _nothing(tensor: Tensor) -> None:
    """The reduction of no elements."""
