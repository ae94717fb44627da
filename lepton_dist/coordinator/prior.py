"""What a run is predicted from before its first step: a measured cluster, or typical figures of CPU cores. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lepton_dist.coordinator.cluster import Cluster, Link, Matmul, RankProfile

# Of one thread of a server of the early 2020s, in round numbers; a rank with n threads does n times as much.
_MEMORY_BYTES_PER_S, _ATTENTION_BYTES_PER_S, _ATTENTION_FLOPS_PER_S = 1e10, 3e9, 2e10
_MATMUL_FLOPS_PER_S = 7e10
_STEP_S, _LAYER_S, _SEQUENCE_S, _KV_HEAD_S, _ELEMENT_S, _LOGIT_S = 5e-4, 2e-4, 1e-5, 1e-6, 2e-9, 2e-9
_WITHIN_NODE, _BETWEEN_NODES = Link(1e-5, 5e9), Link(3e-5, 1e9)


@dataclass(frozen=True)
class Prior:
    """The machines as they are known beforehand. `source` says from where; `is_measured` is false for typical ones."""

    cluster: Cluster
    source: str
    is_measured: bool


def measured_prior(cluster: Cluster) -> Prior:
    """Of a cluster that `profile` has measured."""
    return Prior(cluster, f"the cluster {cluster.name!r}", True)


def typical_prior(hosts: Sequence[str], nodes: Sequence[int], threads: Sequence[int]) -> Prior:
    """Of a job whose machines nobody has measured: its layout is known, its speed is not."""
    ranks = tuple(_typical_rank(rank, host, nodes[rank], threads[rank]) for rank, host in enumerate(hosts))
    source = "typical figures of CPU cores, as the plan names no `cluster`"
    return Prior(Cluster("typical", ranks, _WITHIN_NODE, _BETWEEN_NODES), source, False)


def _typical_rank(rank: int, host: str, node: int, threads: int) -> RankProfile:
    count = max(threads, 1)
    return RankProfile(
        rank=rank,
        host=host,
        node=node,
        device="cpu",
        threads=count,
        memory_bytes=count << 32,
        memory_bytes_per_s=count * _MEMORY_BYTES_PER_S,
        matmul=Matmul({"typical": ((512, count * _MATMUL_FLOPS_PER_S),)}),  # whatever the kind of weights
        attention_bytes_per_s=count * _ATTENTION_BYTES_PER_S,
        attention_flops_per_s=count * _ATTENTION_FLOPS_PER_S,
        step_s=_STEP_S,
        layer_s=_LAYER_S,
        sequence_s=_SEQUENCE_S,
        kv_head_s=_KV_HEAD_S / count,
        element_s=_ELEMENT_S / count,
        logit_s=_LOGIT_S / count,
    )
