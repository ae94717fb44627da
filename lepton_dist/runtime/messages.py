"""Everything that ranks say to one another, as a closed set of types in flat buffers (msgpack). Nothing is unpickled.

Commands go down (rank 0 to leaders, leaders to the ranks of their replica), results come up.
"""

from __future__ import annotations

import msgspec

from lepton_dist.coordinator.reports import StepReport
from lepton_dist.engine.batch import RunBatch
from lepton_dist.engine.request import Request
from lepton_dist.engine.runner import StepResult
from lepton_dist.runtime.facts import RankFacts
from lepton_dist.text.completion import RequestOutput


class OpenSession(msgspec.Struct, tag=True):
    """To every rank: load a model under a plan. `plan` is resolved YAML; dtypes are names.

    `checkpoint` is what rank 0 has read of the model; it is sent to rank 0 alone, which broadcasts it.
    """

    model: str
    plan: str
    weights: str
    kv_cache: str
    wire: str
    compute: str
    threads: int
    checkpoint: bytes = b""


class SessionReady(msgspec.Struct, tag=True):
    """To rank 0: this rank has loaded its shard, on `device`. Zeros where it has no seat."""

    rank: int
    num_blocks: int = 0
    kv_bytes: int = 0
    weight_bytes: int = 0
    threads: int = 0
    device: str = "cpu"
    notices: list[str] = []


class SessionRefused(msgspec.Struct, tag=True):
    """To rank 0: the session cannot be, for a reason that every rank finds; `key` is the plan's key to change."""

    rank: int
    message: str
    key: str


class CloseSession(msgspec.Struct, tag=True):
    """Leave the session: from rank 0 to leaders and spare ranks, from leaders to their replica."""


class SessionClosed(msgspec.Struct, tag=True):
    """To rank 0: this rank has left the session."""

    rank: int


class Examine(msgspec.Struct, tag=True):
    """To every rank: look at your machine, measure your links, and see whether you find the directory `model`.

    With `kinds` of weights, measure how fast you compute with them too; `threads` 0 are the job's.
    """

    model: str
    kinds: list[str] = []
    threads: int = 0


class Examined(msgspec.Struct, tag=True):
    """To rank 0: what this rank found."""

    facts: RankFacts


class Shutdown(msgspec.Struct, tag=True):
    """To every rank: end the process with this exit code."""

    code: int


class Assign(msgspec.Struct, tag=True):
    """To a leader: run these requests."""

    requests: list[Request]


class Drain(msgspec.Struct, tag=True):
    """To a leader: give back what has not begun."""


class TakeBack(msgspec.Struct, tag=True):
    """To a leader: give back those of these requests that have not begun. `Dropped` answers, perhaps with none."""

    keys: list[str]


class Abandon(msgspec.Struct, tag=True):
    """To a leader: give up every request, begun or not, and tell nothing more of them. `Abandoned` answers."""


class Abandoned(msgspec.Struct, tag=True):
    """To rank 0: nothing more comes of what the replica had."""

    replica: int


class Dropped(msgspec.Struct, tag=True):
    """To rank 0: these requests were given back."""

    replica: int
    keys: list[str]


class Measured(msgspec.Struct, tag=True):
    """To rank 0, every now and then: what a replica has begun, and the steps that have come back.

    The seconds of a step are those since the result before it (since its start, when nothing ran then).
    """

    replica: int
    begun: list[str]
    report: StepReport


class Finished(msgspec.Struct, tag=True):
    """To rank 0: a request is done."""

    key: str
    output: RequestOutput


Message = (
    OpenSession
    | SessionReady
    | SessionRefused
    | CloseSession
    | SessionClosed
    | Examine
    | Examined
    | Shutdown
    | Assign
    | Drain
    | TakeBack
    | Dropped
    | Abandon
    | Abandoned
    | Measured
    | Finished
    | RunBatch
    | StepResult
)


class Codec:
    """Messages to bytes and back.

    Raises:
        msgspec.DecodeError: the bytes are no message of the set.
    """

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Message)

    def encode(self, message: Message) -> bytes:
        """A message as bytes."""
        return self._encoder.encode(message)

    def decode(self, payload: bytes) -> Message:
        """The message in some bytes."""
        decoded: Message = self._decoder.decode(payload)
        return decoded
