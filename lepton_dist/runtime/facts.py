"""What a rank finds out about its machine and its links, as plain data that travels to rank 0."""

from __future__ import annotations

import msgspec


class PairTiming(msgspec.Struct, frozen=True):
    """One measured pair of world ranks: half a round trip of 8 bytes, and the rate of large messages one way."""

    first: int
    second: int
    latency_s: float
    bytes_per_s: float


class CollectiveTiming(msgspec.Struct, frozen=True):
    """One cell of a group's calibration: the slowest rank's median seconds."""

    operation: str
    num_bytes: int
    transport: str
    algorithm: str
    seconds: float


class GroupFacts(msgspec.Struct, frozen=True):
    """What joins the ranks of one node, or of the whole job: as seen by the group's first rank.

    `choices` is the calibrated table in words, `notices` say why a transport is missing.
    """

    name: str
    ranks: list[int]
    transports: list[str]
    timings: list[CollectiveTiming]
    choices: list[str]
    notices: list[str]


class ReduceCurve(msgspec.Struct, frozen=True):
    """Measured all-reduces of the ranks of a ``node`` or of the ``job``: bytes, and the slowest rank's seconds."""

    name: str
    num_ranks: int
    seconds: list[tuple[int, float]]


class ComputeFacts(msgspec.Struct, frozen=True):
    """How fast a rank computes while the others of its node do the same; the terms are those of `RankProfile`.

    `matmul` holds, by kind of weights, pairs of width and flops/s.
    """

    memory_bytes_per_s: float
    matmul: dict[str, list[tuple[int, float]]]
    attention_bytes_per_s: float
    attention_flops_per_s: float
    step_s: float
    layer_s: float
    sequence_s: float
    kv_head_s: float
    element_s: float
    logit_s: float


class GpuFacts(msgspec.Struct, frozen=True):
    """One GPU as a rank sees it. `identity` is its UUID in two words; sizes are bytes."""

    name: str
    identity: tuple[int, int]
    memory_bytes: int
    free_bytes: int


class RankFacts(msgspec.Struct, frozen=True):
    """One rank and what it may use of its machine. Sizes are bytes.

    `cores` are those of its affinity mask, `online_cores` the node's. `asked_threads` is 0 where the job asks for none.
    `gpus` are those that the rank sees, in the order of their numbers, and `nccl_problem` says why it cannot use NCCL
    with them. `model` is the fingerprint of the model directory as this node sees it, or begins with ``error:``; it is
    empty where nobody asked or another rank of the node looked.
    """

    rank: int
    versions: dict[str, str]
    cores: list[int]
    online_cores: int
    asked_threads: int
    threads: int
    memory_bytes: int
    node_memory_bytes: int
    shm_bytes: int
    shm_free_bytes: int
    gpus: list[GpuFacts] = []
    nccl_problem: str = ""
    model: str = ""
    groups: list[GroupFacts] = []
    pairs: list[PairTiming] = []
    reduces: list[ReduceCurve] = []
    compute: ComputeFacts | None = None
