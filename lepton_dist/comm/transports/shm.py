"""The shm transport: the collectives of ranks that share memory, over a window of flags and slots.

Operations run in rounds. In each a rank writes its slot, sets its flag to the round's number, waits for the flags of
all, and reads the slots of others. Rounds use the two slots in turn: a flag of round r + 1 says that its rank has
read all it wanted of round r, so when all of them are seen, the slot of round r is free for round r + 2.

Two algorithms for all_reduce: `flat` (everyone sums everything; one wait, for small tensors) and `two_phase`
(everyone sums its part and reads the others' sums; two waits, half the reading).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lepton_dist.comm.patience import Patience
from lepton_dist.comm.tensors import Scratch, accumulates_in, as_bytes, needs_scratch, reduce_rows
from lepton_dist.comm.transport import AllReduceRoutine
from lepton_dist.comm.transports.roll_call import RollCall
from lepton_dist.comm.transports.shm_window import ShmWindow
from lepton_dist.comm.wait import wait_until

# Polls before a wait turns to `wait_until`, which costs a function call a poll.
_SPINS = 200


class ShmTransport:
    """The collectives of one group over its window."""

    name = "shm"

    def __init__(
        self, window: ShmWindow, name: str, members: Sequence[int], roll_call: RollCall, patience: Patience
    ) -> None:
        self.algorithms: Mapping[str, tuple[str, ...]] = {"all_reduce": ("flat", "two_phase")}
        self._window, self._group_name, self._members = window, name, tuple(members)
        self._rank, self._size = window.rank, window.size
        self._roll_call, self._patience = roll_call, patience
        self._round = 0
        self._fence = window.fence
        self._wide = Scratch()
        others = [peer for peer in range(window.size) if peer != window.rank]
        self._arrivals = [window.arrived[peer] for peer in others]
        self._reductions = [window.reduced[peer] for peer in others]

    def all_reduce(self, shape: Sequence[int], dtype: torch.dtype, op: str, algorithm: str) -> AllReduceRoutine:
        """A routine that reduces tensors of this shape in place."""
        # Three or more 16-bit floats are summed in float32. They travel as such: widening each tensor once, on the
        # way in, is cheaper than once on every reader.
        slot_dtype = accumulates_in(dtype) if needs_scratch(dtype, op, self._size) else dtype
        if algorithm == "flat" and math.prod(shape) * slot_dtype.itemsize <= self._window.slot_bytes:
            return self._flat(shape, dtype, slot_dtype, op)
        return lambda tensor: self._two_phase(tensor.view(-1), op)

    def _flat(self, shape: Sequence[int], dtype: torch.dtype, slot_dtype: torch.dtype, op: str) -> AllReduceRoutine:
        rows = [self._typed_slots(turn, slot_dtype, shape) for turn in range(2)]
        mine = [rows[turn][self._rank] for turn in range(2)]
        flag, arrivals, publish, await_all = self._own_flag, self._arrivals, self._publish, self._await_all
        is_widened = slot_dtype != dtype
        combine = torch.add if op == "sum" else torch.maximum

        def routine(tensor: Tensor) -> None:
            self._round = number = self._round + 1
            turn = number & 1
            mine[turn].copy_(tensor)
            publish(flag, number)
            await_all(arrivals, number, "all_reduce")
            if not is_widened:
                reduce_rows(rows[turn], op, tensor)
            else:
                # One buffer for all shapes: a routine is kept for each that was ever seen.
                wide = self._wide.take(shape, slot_dtype)
                reduce_rows(rows[turn], op, wide)
                tensor.copy_(wide)

        def routine_of_two(tensor: Tensor) -> None:
            # The same with the calls drawn in: at 4 us a call, each microsecond of Python counts.
            self._round = number = self._round + 1
            turn = number & 1
            mine[turn].copy_(tensor)
            flag[0] = number
            for _ in spins:
                if peer[0] >= number:
                    break
            else:
                await_all(arrivals, number, "all_reduce")
            first, second = rows[turn]
            combine(first, second, out=tensor)

        if self._size == 2 and self._fence is None:
            peer, spins = arrivals[0], range(_SPINS)
            return routine_of_two
        return routine

    def _two_phase(self, flat: Tensor, op: str) -> None:
        step = self._window.slot_bytes // flat.dtype.itemsize
        for low in range(0, flat.numel(), step):
            self._two_phase_round(flat[low : low + step], op)

    def _two_phase_round(self, part: Tensor, op: str) -> None:
        length = part.numel()
        share = -(-length // self._size)
        number, rows = self._open_round(part.dtype, [length])
        rows[self._rank].copy_(part)
        self._publish(self._own_flag, number)
        self._await_all(self._arrivals, number, "all_reduce")
        low, high = min(self._rank * share, length), min((self._rank + 1) * share, length)
        if low < high:
            mine = part[low:high]
            wide = None
            if needs_scratch(part.dtype, op, self._size):
                wide = self._wide.take([high - low], accumulates_in(part.dtype))
            reduce_rows([row[low:high] for row in rows], op, mine, wide)
            # Nobody else reads this part of this slot before the flag below says that it holds the sum.
            rows[self._rank][low:high].copy_(mine)
        self._publish(self._window.reduced[self._rank], number)
        self._await_all(self._reductions, number, "all_reduce")
        for peer in range(self._size):
            low, high = min(peer * share, length), min((peer + 1) * share, length)
            if peer != self._rank and low < high:
                part[low:high].copy_(rows[peer][low:high])

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`."""
        memory, table = as_bytes(tensor), as_bytes(out).view(self._size, -1)
        step = self._window.slot_bytes
        for low in range(0, memory.numel(), step):
            part = memory[low : low + step]
            rows = self._share("all_gather", part)
            for peer in range(self._size):
                table[peer, low : low + step].copy_(rows[peer])

    def reduce_scatter(self, out: Tensor, tensor: Tensor, op: str) -> None:
        """See `Transport`."""
        flat, table = out.view(-1), tensor.view(self._size, -1)
        is_wide = needs_scratch(out.dtype, op, self._size)
        for low, high in self._column_ranges(table):
            rows = self._share("reduce_scatter", table[:, low:high])
            wide = self._wide.take([high - low], accumulates_in(out.dtype)) if is_wide else None
            reduce_rows([row[self._rank] for row in rows], op, flat[low:high], wide)

    def all_to_all(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`."""
        received, table = out.view(self._size, -1), tensor.view(self._size, -1)
        for low, high in self._column_ranges(table):
            rows = self._share("all_to_all", table[:, low:high])
            for peer in range(self._size):
                received[peer, low:high].copy_(rows[peer][self._rank])

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """See `Transport`."""
        memory = as_bytes(tensor)
        step = self._window.slot_bytes
        for low in range(0, memory.numel(), step):
            part = memory[low : low + step]
            number, rows = self._open_round(torch.uint8, part.shape)
            if self._rank == root:
                rows[root].copy_(part)
            self._publish(self._own_flag, number)
            self._await_all(self._arrivals, number, "broadcast")
            if self._rank != root:
                part.copy_(rows[root])

    def barrier(self) -> None:
        """See `Transport`."""
        self._round += 1
        self._publish(self._own_flag, self._round)
        self._await_all(self._arrivals, self._round, "barrier")

    @property
    def _own_flag(self) -> memoryview:
        return self._window.arrived[self._rank]

    def _share(self, operation: str, part: Tensor) -> list[Tensor]:
        """One round in which every rank shows its `part`; returns those of all, valid until the next round."""
        number, rows = self._open_round(part.dtype, part.shape)
        rows[self._rank].copy_(part)
        self._publish(self._own_flag, number)
        self._await_all(self._arrivals, number, operation)
        return rows

    def _open_round(self, dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, list[Tensor]]:
        self._round += 1
        return self._round, self._typed_slots(self._round & 1, dtype, shape)

    def _typed_slots(self, turn: int, dtype: torch.dtype, shape: Sequence[int]) -> list[Tensor]:
        num_bytes = math.prod(shape) * dtype.itemsize
        with torch.inference_mode(False):
            return [slot[:num_bytes].view(dtype).view(tuple(shape)) for slot in self._window.slots[turn]]

    def _column_ranges(self, table: Tensor) -> list[tuple[int, int]]:
        step = max(1, self._window.slot_bytes // (self._size * table.dtype.itemsize))
        return [(low, min(low + step, table.shape[1])) for low in range(0, table.shape[1], step)]

    def _publish(self, flag: memoryview, number: int) -> None:
        if self._fence is not None:
            self._fence()
        flag[0] = number

    def _await_all(self, flags: list[memoryview], number: int, operation: str) -> None:
        for flag in flags:
            if flag[0] < number:
                self._await(flag, number, operation, flags)
        if self._fence is not None:
            self._fence()

    def _await(self, flag: memoryview, number: int, operation: str, flags: list[memoryview]) -> None:
        what = f"{operation} number {number} of group {self._group_name!r} over shared memory"
        is_first = flags is self._arrivals

        def describe() -> str:
            current = self._window.arrived if is_first else self._window.reduced
            absent = [self._members[i] for i in range(self._size) if i != self._rank and current[i][0] < number]
            return f"{what}; not arrived: {', '.join(self._roll_call.describe(rank) for rank in absent)}"

        self._roll_call.waiting = what
        # A peer may be held up by a message from this rank, which moves only when this rank calls MPI.
        wait_until(lambda: flag[0] >= number, self._patience, describe, self._roll_call.answer)
        self._roll_call.waiting = ""
