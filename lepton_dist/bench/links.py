"""What a plan costs on a link between nodes, from nothing but the plan and the model: messages, bytes, milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lepton_dist.comm.select import GATHER_LIMIT_BYTES
from lepton_dist.comm.wire import EXACT_BYTES, Packets, group_channels
from lepton_dist.errors import UsageError
from lepton_dist.parallel.requirements import num_weights
from lepton_dist.plan.axes import Axis, span_size
from lepton_dist.plan.crossing import WideStage, wide_stages
from lepton_dist.plan.plan import Stage
from lepton_dist.plan.precision import Dtypes
from lepton_dist.runtime.blueprint import Blueprint

# The steps that are priced: one new token of one sequence, and a prompt.
_STEPS = {"decode, 1 token": 1, "prefill, 512 tokens": 512}


@dataclass(frozen=True)
class NetworkLink:
    """What joins two nodes: seconds until a message's first byte arrives, and bytes per second from then on."""

    latency_s: float
    bytes_per_s: float

    @staticmethod
    def parse(text: str) -> NetworkLink:
        """From ``LATENCY_US,MBIT``, such as ``100,1000``.

        Raises:
            UsageError: these are not two numbers, or not positive.
        """
        try:
            latency_us, megabits = map(float, text.split(","))
        except ValueError:
            raise UsageError(f"--link {text}: must be LATENCY_US,MBIT_PER_S, such as 100,1000") from None
        if not (0 <= latency_us < float("inf") and 0 < megabits < float("inf")):
            raise UsageError(f"--link {text}: a latency of at least 0 and a rate above 0 are needed")
        return NetworkLink(latency_us * 1e-6, megabits * 1e6 / 8)

    def message_s(self, num_bytes: float) -> float:
        """Seconds for one message, or for several at once of `num_bytes` together."""
        return self.latency_s + num_bytes / self.bytes_per_s

    def sum_s(self, num_bytes: float, num_ranks: int, num_nodes: int) -> float:
        """Seconds for a sum over ranks: in one round while it is small, else in two over parts. A node has one link."""
        near = -(-num_ranks // num_nodes)
        crossings = near * (num_ranks - near)
        if num_bytes <= GATHER_LIMIT_BYTES:
            return self.message_s(crossings * num_bytes)
        return 2 * self.message_s(crossings * num_bytes / num_ranks)

    def __str__(self) -> str:
        return f"{self.latency_s * 1e6:g} us, {self.bytes_per_s * 8e-6:g} Mbit/s"


class LinkReport:
    """The traffic between nodes of a plan whose ranks lie on nodes in the order of their numbers."""

    def __init__(self, blueprint: Blueprint, dtypes: Dtypes, link: NetworkLink, ranks_per_node: int) -> None:
        self._blueprint, self._link = blueprint, link
        self._nodes = [rank // ranks_per_node for rank in range(max(blueprint.plan.ranks) + 1)]
        self._channels = blueprint.config.shape.hidden
        self._is_int8 = dtypes.wire == "int8"
        self._itemsize = getattr(torch, dtypes.compute).itemsize
        self._wire_itemsize = getattr(torch, dtypes.wire).itemsize
        self._heading = f"between nodes ({link}, {ranks_per_node} rank(s) a node)"

    def lines(self) -> list[str]:
        """What crosses the link, and a warning for each stage that had better not be spread over nodes."""
        lines = []
        for r, replica in enumerate(self._blueprint.plan.replicas):
            for s, (stage, behind) in enumerate(zip(replica.stages, replica.stages[1:], strict=False)):
                if count := self._num_crossing(stage, behind):
                    lines.append(f"  replica {r}, stage {s} to {s + 1}: {count} message(s) a step")
                    lines += [f"    {name}: {self._messages(count, tokens)}" for name, tokens in _STEPS.items()]
        for wide in wide_stages(self._blueprint.plan, self._nodes):
            lines.append(f"  {wide}")
            lines += [f"    {name}: {self._sums(wide, tokens)}" for name, tokens in _STEPS.items()]
            lines += self._warning(wide)
        return [f"{self._heading}, at least:", *lines] if lines else [f"{self._heading}: only commands and results"]

    def _num_crossing(self, stage: Stage, behind: Stage) -> int:
        """Messages from a stage to the next that go to another node: rank j receives from rank j mod n."""
        sources = (stage.ranks[j % len(stage.ranks)] for j in range(len(behind.ranks)))
        return sum(self._nodes[a] != self._nodes[b] for a, b in zip(sources, behind.ranks, strict=True))

    def _messages(self, count: int, num_tokens: int) -> str:
        num_bytes = self._message_bytes(num_tokens)
        return f"{count} x {_size(num_bytes)}, {_time(self._link.message_s(count * num_bytes))}"

    def _sums(self, wide: WideStage, num_tokens: int) -> str:
        return f"{wide.num_sums} x {_size(self._sum_bytes(num_tokens))}, {_time(self._sums_s(wide, num_tokens))}"

    def _warning(self, wide: WideStage) -> list[str]:
        one, prompt = _STEPS.values()
        near, hops = -(-len(wide.stage.ranks) // wide.num_nodes), wide.num_nodes - 1
        pipeline = [_time(hops * self._link.message_s(near * self._message_bytes(tokens))) for tokens in (one, prompt)]
        # As a pipeline over the nodes, a token meets the weights of one rank on each of them, one after the other.
        spared = hops * max(self._num_weights(rank) for rank in wide.stage.ranks)
        read = spared * self._itemsize / self._sums_s(wide, one)
        computed = 2 * prompt * spared / self._sums_s(wide, prompt)
        return [
            f"  warning: stages on nodes of their own (pp {wide.num_nodes} x tp {near}) would send {hops * near} "
            f"message(s) a step, {pipeline[0]} and {pipeline[1]}, and keep all ranks busy with several sequences.",
            f"  tp {len(wide.stage.ranks)} over these nodes shortens a step only where a rank reads less than "
            f"{read / 1e9:.3g} GB/s (decode) or computes less than {computed / 1e12:.3g} TFLOP/s (prefill).",
        ]

    def _message_bytes(self, num_tokens: int) -> int:
        values = num_tokens * self._channels
        return self._packed(values) if self._is_int8 else values * self._wire_itemsize

    def _sum_bytes(self, num_tokens: int) -> int:
        values = num_tokens * self._channels
        plain = values * self._itemsize
        return self._packed(values) if self._is_int8 and plain > EXACT_BYTES else plain

    def _packed(self, values: int) -> int:
        width = group_channels(self._channels)
        return Packets.num_bytes(values // width, width)

    def _sums_s(self, wide: WideStage, num_tokens: int) -> float:
        size, num_bytes = len(wide.stage.ranks), self._sum_bytes(num_tokens)
        return wide.num_sums * self._link.sum_s(num_bytes, size, wide.num_nodes)

    def _num_weights(self, rank: int) -> int:
        """Weights that a token meets on a rank: all but the rows of an embedding that is not the head too."""
        blueprint = self._blueprint
        seat = blueprint.seats[rank]
        is_looked_up = seat.is_first and not (seat.is_last and blueprint.config.is_tied)
        rows = span_size(seat.spans[Axis.VOCAB]) if is_looked_up else 0
        return num_weights(blueprint.table, seat) - rows * self._channels


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
