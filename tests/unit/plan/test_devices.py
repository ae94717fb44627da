"""Which rank takes which GPU: the binding of a node's ranks, and a plan's devices."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_dist.errors import ConfigError
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.devices import Binding, GpuId, Sight, bind, can_use_nccl, place_ranks
from lepton_dist.plan.document import parse_plan, plan_to_yaml
from lepton_dist.plan.plan import Plan

SHAPE = ModelShape(num_layers=4, hidden=64, num_heads=8, num_kv_heads=8, head_dim=8, ffn=128, vocab=256)
A, B, C, D = ((number, -number) for number in range(4))


def placed(text: str, nodes: list[int], sights: list[Sight]) -> dict[int, int | None]:
    plan = parse_plan(text).resolve(SHAPE, len(nodes))
    return {rank: binding.gpu for rank, binding in place_ranks(plan, nodes, sights).items()}


def sees(*gpus: GpuId, nccl: bool = True) -> Sight:
    return Sight(gpus, nccl)


def test_ranks_that_see_all_gpus_take_them_by_local_rank() -> None:
    assert bind([(A, B, C, D)] * 4, 1) == [0, 1, 2, 3]
    assert bind([(A, B)] * 4, 2) == [0, 1, 0, 1]
    assert bind([(A, B)] * 3, 1) == [0, 1, None]


def test_ranks_that_slurm_has_bound_keep_their_own() -> None:
    assert bind([(A,), (B,), (C,)], 1) == [0, 0, 0]
    assert bind([(A,), (A,)], 1) == [0, None]


def test_a_rank_with_a_choice_makes_room_for_one_without() -> None:
    assert bind([(A, B), (A,)], 1) == [1, 0]
    assert bind([(A, B), (A, B), (B, C), (B,)], 1) == [0, 1, 1, None]
    assert bind([(B, A), (B, C), (B,)], 1) == [1, 1, 0]


@given(st.lists(st.lists(st.sampled_from([A, B, C, D]), unique=True, max_size=4), max_size=7), st.integers(1, 3))
def test_binding_leaves_nobody_out_who_could_be_served(sights: list[list[GpuId]], most: int) -> None:
    numbers = bind(sights, most)
    load = Counter(sight[number] for sight, number in zip(sights, numbers, strict=True) if number is not None)
    assert all(count <= most for count in load.values())
    # By brute force: no way to serve more ranks.
    best, states = 0, {(0, 0, 0, 0): 0}
    for sight in sights:
        after = dict(states)
        for state, served in states.items():
            for gpu in sight:
                index = (A, B, C, D).index(gpu)
                if state[index] < most:
                    new = (*state[:index], state[index] + 1, *state[index + 1 :])
                    after[new] = max(after.get(new, 0), served + 1)
        states = after
    best = max(states.values())
    assert sum(number is not None for number in numbers) == best


def test_cpu_is_the_default_and_nothing_is_bound() -> None:
    assert placed("mesh: {tp: 2}", [0, 0], [sees(A, B)] * 2) == {0: None, 1: None}


def test_cpu_and_gpu_stages_of_one_plan() -> None:
    text = "replicas: [{stages: [{ranks: [1], device: cuda}, {ranks: [0], device: cpu}]}]"
    assert placed(text, [0, 0], [sees(A)] * 2) == {1: 0, 0: None}


def test_auto_takes_gpus_where_every_rank_of_the_node_has_one() -> None:
    text = "mesh: {pp: 3}\ndevice: auto"
    # Two ranks of node 0 with two GPUs; node 1 has none.
    assert placed(text, [0, 0, 1], [sees(A, B), sees(A, B), sees()]) == {0: 0, 1: 1, 2: None}
    # Two ranks and one GPU: half a node on a GPU would make the other half wait for it.
    assert placed(text, [0, 0, 1], [sees(A), sees(A), sees()]) == {0: None, 1: None, 2: None}
    assert placed(text + "\nranks_per_gpu: 2", [0, 0, 1], [sees(A), sees(A), sees()]) == {0: 0, 1: 0, 2: None}


def test_auto_without_nccl_stays_on_cpus_where_a_stage_would_need_it() -> None:
    sights = [sees(A, B, nccl=False)] * 2
    assert placed("mesh: {tp: 2}\ndevice: auto", [0, 0], sights) == {0: None, 1: None}
    assert placed("mesh: {pp: 2}\ndevice: auto", [0, 0], sights) == {0: 0, 1: 1}


def test_a_stage_that_must_goes_before_one_that_may() -> None:
    text = "replicas: [{stages: [{ranks: [0], device: auto}, {ranks: [1], device: cuda}]}]"
    assert placed(text, [0, 0], [sees(A)] * 2) == {0: None, 1: 0}


def test_sharers_are_counted_by_identity() -> None:
    plan = parse_plan("mesh: {pp: 2}\ndevice: cuda\nranks_per_gpu: 2").resolve(SHAPE, 2)
    bindings = place_ranks(plan, [0, 0], [sees(A), sees(A)])
    assert bindings[0] == bindings[1] == Binding(0, A, 2)


@pytest.mark.parametrize(
    ("text", "sights", "message"),
    [
        ("mesh: {tp: 1}\ndevice: cuda", [sees()], "rank 0 is to compute on a GPU, but sees none"),
        (
            "mesh: {pp: 2}\ndevice: cuda",
            [sees(A)] * 2,
            "rank 1 finds no GPU left: 2 rank(s) of its node share 1 GPU(s), at most 1 on each; start as many ranks as "
            "GPUs, or write `ranks_per_gpu: 2`",
        ),
        (
            "mesh: {tp: 2}\ndevice: cuda",
            [sees(A, B), sees(A, B, nccl=False)],
            "2 GPUs share the stage's layers, which needs NCCL through CuPy, and rank 1 cannot load it: pip install "
            "'lepton-dist[gpu]'",
        ),
    ],
)
def test_what_cannot_be_says_what_to_change(text: str, sights: list[Sight], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        placed(text, [0] * len(sights), sights)
    assert message in str(caught.value) and caught.value.key.endswith(".device")


def test_nccl_wants_a_gpu_of_its_own_for_every_member() -> None:
    one, other, cpu = Binding(0, A), Binding(0, B), Binding()
    assert can_use_nccl([one, other])
    assert not can_use_nccl([one, one]) and not can_use_nccl([one, cpu]) and not can_use_nccl([cpu, cpu])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh: {tp: 1}\ndevice: gpu", "plan:2: device: 'gpu' is no device; known: cpu, cuda, auto"),
        ("mesh: {tp: 1}\nranks_per_gpu: 0", "plan:2: ranks_per_gpu: must be a whole number of at least 1, not 0"),
        (
            "replicas:\n- stages:\n  - {ranks: [0], device: 3}",
            "plan:3: replicas[0].stages[0].device: 3 is no device; known: cpu, cuda, auto",
        ),
    ],
)
def test_keys_are_checked(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_plan(text)
    assert str(caught.value) == message


def test_devices_are_written_and_read_back() -> None:
    text = "replicas: [{stages: [{ranks: [0], device: cuda}, {ranks: [1]}]}]\ndevice: auto\nranks_per_gpu: 3"
    plan = parse_plan(text)
    assert parse_plan(plan_to_yaml(plan)) == plan
    assert "device" not in plan_to_yaml(Plan.from_mesh(tp=2)) and "ranks_per_gpu" not in plan_to_yaml(Plan.from_mesh())
    resolved = plan.resolve(SHAPE, 2)
    assert resolved.wants_gpus and [resolved.device_of(s) for s in resolved.replicas[0].stages] == ["cuda", "auto"]
