"""What is written of a plan's price into the plan itself. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lepton_dist.coordinator.pricing import PRICE_ERROR, Priced, Target
from lepton_dist.plan.plan import Plan, Precision


def estimated(
    target: Target, best: Priced, objective: str, precision: Precision, cluster_file: str | None = None
) -> Plan:
    """The plan to write, with what was predicted of it."""
    estimate: dict[str, Any] = {
        "cluster": target.cluster.name,
        "objective": objective,
        "tokens_per_s": round(best.tokens_per_s, 2),
        "tokens_per_s_range": [round(value, 2) for value in error_bar(best)],
        "request_alone_s": round(best.latency_s, 4),
        "rank_bytes": max(best.fit.rank_bytes.values()),
    }
    if best.seconds is not None:
        estimate["seconds"] = round(best.seconds, 2)
        estimate["core_hours"] = round(core_hours(target, best.seconds), 4)
    return replace(best.plan, precision=precision, estimate=estimate, cluster=cluster_file)


def error_bar(plan: Priced) -> tuple[float, float]:
    """Tokens/s that the plan is expected to stay within."""
    return plan.tokens_per_s * (1 - PRICE_ERROR), plan.tokens_per_s * (1 + PRICE_ERROR)


def num_cores(target: Target) -> int:
    """Cores of the whole job, which is what its hours are counted by."""
    return sum(profile.threads for profile in target.cluster.ranks)


def core_hours(target: Target, seconds: float) -> float:
    """What so many seconds of the job cost."""
    return seconds * num_cores(target) / 3600
