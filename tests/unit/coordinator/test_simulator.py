"""The simulator against sums done by hand, against itself without jumps, and against the balancer's log."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lepton_dist.bench.workload import offline_lengths
from lepton_dist.coordinator.cluster import Cluster, Link, Matmul, RankProfile
from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.decisions import replay
from lepton_dist.coordinator.simulator import Simulated, Simulator, kv_blocks
from lepton_dist.coordinator.timeline import chrome_trace
from lepton_dist.coordinator.workload import RequestLengths
from lepton_dist.coordinator.workload_file import read_workload
from lepton_dist.engine.work import StepWork
from lepton_dist.errors import ConfigError
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.plan import EngineLimits, Plan, Replica, Stage
from lepton_dist.plan.precision import Dtypes

SHAPE = ModelShape(num_layers=12, hidden=768, num_heads=12, num_kv_heads=4, head_dim=64, ffn=3072, vocab=32000)
LIMITS = EngineLimits(max_sequences=16)


def cluster(speeds: list[float]) -> Cluster:
    ranks = []
    for rank, speed in enumerate(speeds):
        matmul = Matmul({"bfloat16": ((1, 1e10 * speed), (32, 2e11 * speed), (512, 4e11 * speed))})
        seconds = (1e-3 / speed, 1e-4 / speed, 1e-5 / speed)
        ranks.append(
            RankProfile(
                rank, f"h{rank}", rank, "cpu", 1, 2**34, 1e10 * speed, matmul, 5e9 * speed, 1e11 * speed, *seconds
            )
        )
    return Cluster("made up", tuple(ranks), Link(1e-6, 1e10), Link(1e-5, 1e9))


def simulator(speeds: list[float], *, stages: int = 1, blocks: int = 4096, jumps: bool = True, **more) -> Simulator:
    machines = cluster(speeds)
    groups = [tuple(range(first, first + stages)) for first in range(0, len(speeds), stages)]
    replicas = tuple(Replica(tuple(Stage((rank,)) for rank in ranks)) for ranks in groups)
    limits = replace(LIMITS, **more.pop("limits", {}))
    plan = Plan(replicas=replicas, engine=limits).resolve(SHAPE, len(speeds))
    costs = CostModel(machines, plan, SHAPE, Dtypes("bfloat16", "bfloat16", "bfloat16", "bfloat16"))
    return Simulator(plan, costs, [blocks] * len(replicas), jumps=jumps, **more)


def requests(count: int, seed: int = 1) -> list[RequestLengths]:
    return [RequestLengths(item.prompt, item.output, item.output) for item in offline_lengths(count, seed)]


def check(result: Simulated, workload: list[RequestLengths]) -> None:
    assert len(result.latencies_s) == len(result.first_token_s) == len(workload)
    assert result.output_tokens == sum(item.output_tokens for item in workload)
    assert all(0 <= result.idle(*place) < 1 for place in result.lanes)
    assert max(result.latencies_s) <= result.makespan_s


def test_one_request_takes_the_sum_of_its_steps() -> None:
    made = simulator([1.0])
    cost = made._replicas[0]._cost
    seconds = cost.step_s(StepWork(100, 1, 1, 0, 100 * 101 // 2))
    seconds += sum(cost.step_s(StepWork(1, 1, 1, 101 + step)) for step in range(9))
    result = made.run([RequestLengths(100, 10, 10)])
    assert result.makespan_s == pytest.approx(seconds)
    assert result.idle(0, 0) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("blocks", [4096, 60])
def test_jumps_change_nothing(blocks: int) -> None:
    """One replica, requests that come one by one, blocks in plenty and so few that sequences are preempted."""
    # A jump's steps are alike: what arrives at the edge of one may get into the next. With this seed nothing does.
    source = random.Random(4)
    workload = [
        RequestLengths(item.prompt, item.output, item.output, arrival_s=source.uniform(0, 20))
        for item in offline_lengths(80, seed=4)
    ]
    workload.sort(key=lambda item: item.arrival_s)
    plain = simulator([1.0], blocks=blocks, jumps=False).run(workload)
    quick = simulator([1.0], blocks=blocks).run(workload)
    check(plain, workload)
    assert plain.num_preemptions == quick.num_preemptions
    assert (blocks == 60) == (plain.num_preemptions > 0)
    assert quick.makespan_s == pytest.approx(plain.makespan_s, rel=1e-3)
    assert sorted(quick.latencies_s) == pytest.approx(sorted(plain.latencies_s), rel=0.02)
    assert sum(quick.latencies_s) == pytest.approx(sum(plain.latencies_s), rel=0.01)


def test_unequal_replicas_end_together() -> None:
    workload = requests(600)
    speeds = [1.0, 2.0, 4.0]
    alone = [simulator([speed]).run(workload).makespan_s for speed in speeds]
    bound_s = 1 / sum(1 / seconds for seconds in alone)
    result = simulator(speeds).run(workload)
    check(result, workload)
    assert result.makespan_s <= 1.05 * bound_s
    turns = simulator(speeds, limits={"balancer": "round_robin"}).run(workload)
    assert turns.makespan_s > 1.5 * bound_s


def test_a_pipeline_keeps_its_stages_busy() -> None:
    """As many sequences a batch as with one stage: then two stages are nearly twice as fast."""
    workload = requests(400)
    one = simulator([1.0]).run(workload)
    two = simulator([1.0, 1.0], stages=2, limits={"max_sequences": 32}).run(workload)
    check(two, workload)
    assert 1.5 < one.makespan_s / two.makespan_s <= 2.05
    assert set(two.lanes) == {(0, 0), (0, 1)}


def test_the_log_replays_and_the_trace_adds_up() -> None:
    lines: list[str] = []
    result = simulator([1.0, 3.0], write=lines.append).run(requests(100))
    assert replay(lines).num_outstanding == 0
    trace = chrome_trace(result.lanes, {place: (place[0],) for place in result.lanes})
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for replica in (0, 1):
        busy = sum(span["dur"] * span["args"]["busy"] for span in spans if span["pid"] == replica)
        assert busy / 1e6 == pytest.approx(result.lanes[replica, 0].busy_s, rel=1e-3)
    ends = [(span["pid"], span["ts"], span["ts"] + span["dur"]) for span in spans]
    assert all(a[0] != b[0] or a[2] <= b[1] + 0.01 for a, b in itertools.pairwise(ends)), "spans overlap"


def test_a_request_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="request 2 needs 200 tokens of KV cache, a replica has 160"):
        simulator([1.0], blocks=10).run([RequestLengths(10, 10, 10), RequestLengths(100, 100, 100)])


def test_kv_blocks_are_those_of_the_scarcest_rank() -> None:
    machines = cluster([1.0, 1.0])
    small = replace(machines.ranks[1], memory_bytes=2**30)
    machines = replace(machines, ranks=(machines.ranks[0], small))
    plan = Plan(replicas=(Replica((Stage((0,)), Stage((1,)))),)).resolve(SHAPE, 2)
    costs = CostModel(machines, plan, SHAPE, Dtypes("bfloat16", "bfloat16", "bfloat16", "bfloat16"))
    block = 16 * 6 * 2 * 4 * 64 * 2  # tokens, layers, keys and values, heads, head, bytes
    assert kv_blocks(plan, costs, machines, 10**6) == [2**29 // block]
    assert kv_blocks(plan, costs, machines, 7) == [7]
    tiny = replace(machines, ranks=(machines.ranks[0], replace(small, memory_bytes=2**20)))
    with pytest.raises(ConfigError, match=r"rank 1 needs .* but has 1048576"):
        kv_blocks(plan, costs, tiny, 10**6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no request of a workload"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "outputs": 3}', "is no request of a workload.*outputs"),
        ('{"prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens: must be at least 1, not 0"),
        ('{"prompt_tokens": 1, "output_tokens": 9, "max_tokens": 5}', "max_tokens: is 5, but output_tokens is 9"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "count": 0}', "count: must be from 1 to"),
        ("", "holds no request"),
    ],
)
def test_a_bad_workload_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        read_workload(path)


def test_a_workload_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(
        '{"prompt_tokens": 5, "output_tokens": 2, "arrival_s": 3}\n'
        '{"prompt_tokens": 4, "output_tokens": 1, "count": 2}\n'
    )
    assert read_workload(path) == [RequestLengths(4, 1, 1)] * 2 + [RequestLengths(5, 2, 2, 3.0)]


@pytest.mark.slow
def test_a_hundred_thousand_requests_a_minute() -> None:
    """256 replicas of eight speeds. The processor's time counts, so that neighbours do not."""
    made = simulator([1 + rank * 7 % 8 / 2 for rank in range(256)])
    start_s = time.process_time()
    made.run(requests(100_000))
    seconds = time.process_time() - start_s
    print(f"{100_000 / seconds * 60:.0f} simulated requests a minute")
    assert seconds <= 60


def test_messages_to_and_from_rank_0_take_their_time() -> None:
    """A request that is alone on a far replica: there, its steps, and back; and nothing is lost on the way."""
    near, far = simulator([1.0, 1.0]), simulator([1.0, 1.0])
    for replica in far._replicas[1:]:
        replica.reach_s = 0.5
    workload = requests(60)
    quick, slow = near.run(workload), far.run(workload)
    check(slow, workload)
    assert quick.makespan_s < slow.makespan_s < quick.makespan_s + 10
    one = simulator([1.0])
    one._replicas[0].reach_s = 0.25
    alone = [RequestLengths(100, 10, 10)]
    assert one.run(alone).makespan_s == pytest.approx(simulator([1.0]).run(alone).makespan_s + 0.5)
