"""int8 on slow links: activations travel as one byte a value, with a scale for each token and group of channels.

A few channels of a residual stream are a hundred times larger than the rest: with a scale for each group of 64 they
cost their own group its precision and no other. The sum over ranks is cut as in ZeRO++ and EQuARX: parts are exchanged
in int8, summed in float32, and the sums gathered in int8. Every rank, the part's owner included, goes on with what was
gathered, so that all have the same bits.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from lepton_dist.comm.group import Group
from lepton_dist.comm.tensors import Scratch

GROUP_CHANNELS = 64
# Up to this size packing takes longer than the bytes that it saves, at 1 Gbit/s: such a sum travels as it is.
EXACT_BYTES = 32 << 10
_LARGEST_CODE = 127
# Below it a group counts as zeros: its scale would leave the range in which bfloat16 is exact to 8 bits.
_SMALLEST_SCALE = 1e-30


def group_channels(channels: int) -> int:
    """Channels that share a scale: 64, or the largest power of two that divides `channels` where that is less."""
    return math.gcd(channels, GROUP_CHANNELS)


class Packets:
    """`num` packets of `count` groups of `width` values: bfloat16 scales, then int8 codes, one packet behind the other.

    A value is its code times its group's scale: off by half a scale at most, which is a 254th of the group's largest.
    Shapes: memory uint8 [num, bytes], scales [num, count, 1], codes [num, count, width].
    """

    def __init__(self, memory: Tensor, count: int, width: int) -> None:
        self.memory = memory
        self.scales = memory[:, : 2 * count].view(torch.bfloat16).unsqueeze(2)
        self.codes = memory[:, 2 * count : (2 + width) * count].view(torch.int8).view(-1, count, width)

    @staticmethod
    def num_bytes(count: int, width: int) -> int:
        """The size of one: even, so that the scales of the next are aligned."""
        return -(-count * (2 + width) // 2) * 2

    @staticmethod
    def empty(num: int, count: int, width: int, device: torch.device | None = None) -> Packets:
        """Packets that are still to be written or received, on the CPU by default."""
        memory = torch.empty((num, Packets.num_bytes(count, width)), dtype=torch.uint8, device=device)
        return Packets(memory, count, width)


class Codec:
    """Writes packets and reads them; its buffers are used again, for fresh ones of some MB cost more than the work."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._wide, self._room = Scratch(device), Scratch(device)

    def write(self, packets: Packets, values: Tensor) -> None:
        """Quantise `values` [num, count, width] of any float dtype. A group with a NaN or an infinity becomes NaN."""
        # Without the sign, floats are in the order of their bits as integers, whose maximum is the faster one.
        bits = torch.int32 if values.dtype == torch.float32 else torch.int16
        magnitudes = self._room.take(values.shape, bits)
        torch.bitwise_and(values.view(bits), torch.iinfo(bits).max, out=magnitudes)
        peaks = magnitudes.amax(dim=2, keepdim=True).view(values.dtype).float()
        packets.scales.copy_(peaks.div_(_LARGEST_CODE).clamp_min_(_SMALLEST_SCALE))
        # bfloat16 rounds the scale by at most one part in 512, so that no code is beyond 127.25: none needs cutting.
        scaled = self._room.take(values.shape, torch.float32)
        torch.mul(values, packets.scales.float().reciprocal_(), out=scaled)
        packets.codes.copy_(scaled.round_())

    def read(self, packets: Packets, out: Tensor) -> None:
        """Packets -> `out` [num, count, width] of any float dtype."""
        wide = out if out.dtype == torch.float32 else self._room.take(out.shape, torch.float32)
        wide.copy_(packets.codes).mul_(packets.scales)
        if wide is not out:
            out.copy_(wide)

    def sum(self, packets: Packets) -> Tensor:
        """The packets added in their order: float32 [1, count, width], valid until the next `read`."""
        rows = self._wide.take(packets.codes.shape, torch.float32)
        self.read(packets, rows)
        total = rows[:1]
        for row in rows[1:]:
            total += row
        return total


class Int8AllReduce:
    """The sum of activations over a group, int8 on the wire; short messages are summed as they are."""

    def __init__(self, group: Group, device: torch.device | None = None) -> None:
        self._group, self._device = group, device
        self._codec, self._padded = Codec(device), Scratch(device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, channels] of any float dtype -> the sum over the group, in place where x is contiguous.

        Raises:
            RankLostError: a member did not arrive before the deadline.
        """
        size = self._group.size
        if size == 1 or x.nbytes <= EXACT_BYTES:
            return self._group.all_reduce(x)
        values = x.reshape(-1, group_channels(x.shape[-1]))
        count, width = values.shape
        share = -(-count // size)
        parts = values
        if count < size * share:
            parts = self._padded.take((size * share, width), x.dtype).zero_()
            parts[:count].copy_(values)
        parts = parts.view(size, share, width)
        # Each part goes to the rank that adds it up, and the sums come back.
        outgoing = Packets.empty(size, share, width, self._device)
        mine = Packets.empty(1, share, width, self._device)
        self._codec.write(outgoing, parts)
        arrived = Packets(self._group.all_to_all(outgoing.memory), share, width)
        self._codec.write(mine, self._codec.sum(arrived))
        gathered = Packets(self._group.all_gather(mine.memory[0]), share, width)
        self._codec.read(gathered, parts)
        if count < size * share:
            values.copy_(parts.view(-1, width)[:count])
        return values.view(x.shape)


class Wire(Protocol):
    """How activations [tokens, channels] look between stages."""

    def buffer(self, num_tokens: int) -> Tensor:
        """Room to receive so many tokens in."""
        ...

    def pack(self, hidden: Tensor) -> Tensor:
        """float32 [tokens, channels] -> what is sent."""
        ...

    def unpack(self, buffer: Tensor) -> Tensor:
        """What was received -> float32 [tokens, channels]."""
        ...


class PlainWire:
    """Activations in a float dtype."""

    def __init__(self, channels: int, dtype: torch.dtype, device: torch.device | None) -> None:
        self._channels, self._dtype, self._device = channels, dtype, device

    def buffer(self, num_tokens: int) -> Tensor:
        """See `Wire`."""
        return torch.empty((num_tokens, self._channels), dtype=self._dtype, device=self._device)

    def pack(self, hidden: Tensor) -> Tensor:
        """See `Wire`."""
        return hidden.to(self._dtype)

    def unpack(self, buffer: Tensor) -> Tensor:
        """See `Wire`."""
        return buffer.float()


class Int8Wire:
    """Activations as a packet."""

    def __init__(self, channels: int, device: torch.device | None) -> None:
        self._channels, self._width = channels, group_channels(channels)
        self._device, self._codec = device, Codec(device)

    def buffer(self, num_tokens: int) -> Tensor:
        """See `Wire`."""
        return self._packet(num_tokens * self._channels).memory

    def pack(self, hidden: Tensor) -> Tensor:
        """See `Wire`."""
        packet = self._packet(hidden.numel())
        self._codec.write(packet, hidden.reshape(packet.codes.shape))
        return packet.memory

    def unpack(self, buffer: Tensor) -> Tensor:
        """See `Wire`."""
        packet = Packets(buffer, buffer.numel() // (2 + self._width), self._width)
        hidden = torch.empty(packet.codes.shape, device=self._device)
        self._codec.read(packet, hidden)
        return hidden.view(-1, self._channels)

    def _packet(self, num_values: int) -> Packets:
        return Packets.empty(1, num_values // self._width, self._width, self._device)


def make_wire(channels: int, dtype: torch.dtype, device: torch.device | None = None) -> Wire:
    """The wire of a plan's `precision.wire`: int8, or a float dtype; its tensors are on the CPU by default."""
    return Int8Wire(channels, device) if dtype == torch.int8 else PlainWire(channels, dtype, device)
