"""`doctor`: from facts to verdicts, and the examination itself over threads that stand for ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace as replaced
from pathlib import Path

import msgspec
import pytest

from lepton_dist.bench.doctor import DoctorConfig, find
from lepton_dist.bench.doctor_check import Check, numbers, size, table
from lepton_dist.bench.doctor_devices import check_devices
from lepton_dist.bench.doctor_links import check_links
from lepton_dist.bench.doctor_local import check_output
from lepton_dist.bench.doctor_machine import Site, check_machines, library_name
from lepton_dist.bench.doctor_model import check_model, check_plan
from lepton_dist.comm.launcher import Launcher
from lepton_dist.comm.world import World, run_local
from lepton_dist.runtime.examine import examine
from lepton_dist.runtime.facts import CollectiveTiming, GpuFacts, GroupFacts, PairTiming, RankFacts
from lepton_dist.runtime.messages import Codec, Examined

GIB = 1 << 30
MODEL = Path(__file__).parents[3] / "configs" / "examples" / "tiny-stdlib"
# Two nodes of two ranks, each rank with two of its node's four cores.
SITE = Site(("a", "a", "b", "b"), (0, 0, 1, 1), Launcher("mpich", 0, 4), "MPICH Version:   5.0.2")


def facts_of(rank: int) -> RankFacts:
    return RankFacts(
        rank=rank,
        versions={"python": "3.11.7", "torch": "2.13.0"},
        cores=[2 * (rank % 2), 2 * (rank % 2) + 1],
        online_cores=4,
        asked_threads=0,
        threads=2,
        memory_bytes=8 * GIB,
        node_memory_bytes=20 * GIB,
        shm_bytes=10 * GIB,
        shm_free_bytes=10 * GIB,
        groups=[GroupFacts("node", [rank, rank + 1], ["mpi", "shm"], [], [], [])] if rank % 2 == 0 else [],
    )


FACTS = [facts_of(rank) for rank in range(4)]


def changed(**values: object) -> list[RankFacts]:
    """The facts, with rank 2 differing."""
    return [msgspec.structs.replace(fact, **values) if fact.rank == 2 else fact for fact in FACTS]


def by_topic(checks: list[Check]) -> dict[str, Check]:
    return {check.topic: check for check in checks}


def test_a_sound_job_has_nothing_but_ok() -> None:
    checks = by_topic(check_machines(SITE, FACTS))
    assert {check.verdict for check in checks.values()} == {"OK"}, checks
    assert not any(check.advice for check in checks.values())
    assert checks["MPI"].found == "MPICH Version: 5.0.2; started by MPICH's mpirun (PMI); both see 4 ranks"
    assert checks["nodes"].found == "4 rank(s) on 2 node(s): a: rank 0-1; b: rank 2-3"
    assert checks["cores"].found == "rank 0 may use core(s) 0-1 of 4; 2 thread(s) a rank"
    assert checks["memory"].found == "8.0 GiB a rank, of 20.0 GiB in the node"


@pytest.mark.parametrize(
    ("topic", "verdict", "found", "facts"),
    [
        ("software", "FAIL", "rank 2 on b has torch 2.11.0", changed(versions={"python": "3.11.7", "torch": "2.11.0"})),
        ("software", "FAIL", "rank 2 on b has torch None", changed(versions={"python": "3.11.7"})),
        ("memory", "WARN", "from 512.0 MiB (rank 2 on b) to 8.0 GiB a rank", changed(memory_bytes=GIB // 2)),
        ("memory", "OK", "from 4.0 GiB (rank 2 on b) to 8.0 GiB a rank", changed(memory_bytes=4 * GIB)),
        ("cores", "WARN", "the ranks on b ask for 5 threads and have 4 cores", changed(threads=3)),
        ("cores", "WARN", "b has 16 cores, its 2 rank(s) may use 4", changed(online_cores=16)),
        (
            "shared memory",
            "WARN",
            "rank 2 on b: no window",
            changed(groups=[GroupFacts("node", [2, 3], ["mpi"], [], [], ["no window"])]),
        ),
    ],
)
def test_each_fault_is_found(topic: str, verdict: str, found: str, facts: list[RankFacts]) -> None:
    checks = by_topic(check_machines(SITE, facts))
    check = checks.pop(topic)
    assert check.verdict == verdict and found in check.found, check
    assert bool(check.advice) == (verdict != "OK")
    assert {other.verdict for other in checks.values()} == {"OK"}, checks


GPUS = [GpuFacts("H200", (number, -1), 140 * GIB, 139 * GIB) for number in range(2)]


def test_the_map_of_gpus() -> None:
    assert check_devices(SITE, FACTS) == Check("devices", "OK", "CPUs; no rank sees a GPU")
    seeing = [msgspec.structs.replace(fact, gpus=GPUS) if fact.rank < 2 else fact for fact in FACTS]
    check = check_devices(SITE, seeing)
    assert check.verdict == "OK" and not check.advice
    assert check.found.splitlines()[:3] == [
        "2 of 4 rank(s) have a GPU of their own",
        "rank 0 on a: GPU 0, H200 (00000000), 139.0 GiB free of 140.0 GiB",
        "rank 1 on a: GPU 1, H200 (00000000), 139.0 GiB free of 140.0 GiB",
    ]
    shared = check_devices(SITE, [msgspec.structs.replace(fact, gpus=GPUS[:1]) for fact in FACTS])
    assert shared.verdict == "WARN" and "rank 1 on a sees 1 GPU(s), which other ranks take" in shared.found
    lacking = check_devices(SITE, [msgspec.structs.replace(fact, nccl_problem="no cupy") for fact in seeing])
    assert lacking.verdict == "WARN" and "no NCCL: no cupy" in lacking.found and "lepton-dist[gpu]" in lacking.advice


def test_ranks_that_share_cores_are_a_warning() -> None:
    facts = [msgspec.structs.replace(fact, cores=[0], threads=1, online_cores=1) for fact in FACTS]
    check = by_topic(check_machines(SITE, facts))["cores"]
    assert check.verdict == "WARN"
    assert "2 ranks on a share 1 core(s) (and 1 more node(s))" in check.found


def test_one_host_that_counts_as_two_nodes_is_a_warning() -> None:
    check = by_topic(check_machines(replaced(SITE, hosts=("a",) * 4), FACTS))["nodes"]
    assert check.verdict == "WARN" and "a counts as 2 nodes" in check.found


def test_nodes_with_unequal_numbers_of_ranks_are_a_warning() -> None:
    check = by_topic(check_machines(replaced(SITE, nodes=(0, 0, 0, 1), hosts=("a", "a", "a", "b")), FACTS))["nodes"]
    assert check.verdict == "WARN" and "some nodes have 1 ranks and others 3" in check.found


def links(**pairs: PairTiming) -> dict[str, Check]:
    timings = [CollectiveTiming("all_reduce", 4096, "shm", "flat", 7e-6)]
    timings += [CollectiveTiming("all_reduce", 4096, "mpi", "gather", 20e-6)]
    timings += [CollectiveTiming("all_gather", 4096, "mpi", "direct", 9e-6)]
    group = GroupFacts("node", [0, 1], ["mpi", "shm"], timings, [], [])
    return by_topic(check_links(SITE, changed(groups=[group], pairs=list(pairs.values()))))


def test_links_are_told_apart_and_judged() -> None:
    inside, between = PairTiming(0, 1, 2e-6, 5e9), PairTiming(0, 2, 20e-6, 1.2e9)
    checks = links(inside=inside, between=between)
    assert checks["inside nodes"] == Check(
        "inside nodes", "OK", "8 bytes in 2.0 us, 4 MiB at 5.00 GB/s (rank 0 on a and rank 1 on a)"
    )
    assert checks["between nodes"].found == "8 bytes in 20.0 us, 4 MiB at 1.20 GB/s (rank 0 on a and rank 2 on b)"
    assert checks["between nodes"].verdict == "OK"
    grid = checks["collectives, node"].found
    # The faster of two is marked; the only one is not.
    assert "all_reduce shm flat" in grid and "         7*" in grid and " 9*" not in grid and "20*" not in grid


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (PairTiming(0, 2, 5e-3, 1e9), "8 bytes in 5000.0 us"),
        (PairTiming(0, 2, 2e-5, 0.11e9), "4 MiB at 0.11 GB/s"),
    ],
)
def test_a_slow_network_is_a_warning(between: PairTiming, words: str) -> None:
    check = links(between=between)["between nodes"]
    assert check.verdict == "WARN" and words in check.found and "keep tensor parallelism inside nodes" in check.advice


def test_a_pair_that_stands_out_is_named() -> None:
    pairs = {f"p{i}": PairTiming(0, 2, 2e-5, 10e9) for i in range(4)}
    check = links(**pairs, odd=PairTiming(1, 3, 2e-5, 1e9))["between nodes"]
    assert check.verdict == "WARN" and "one pair stands out" in check.advice
    assert "rank 1 on a and rank 3 on b" in check.found and "over 5 pairs" in check.found


def test_a_slow_pair_inside_a_node_is_a_warning() -> None:
    assert links(inside=PairTiming(0, 1, 2e-3, 5e9))["inside nodes"].verdict == "WARN"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(MODEL, target)
    return target


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def other_shape(model: Path) -> None:
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"intermediate_size": 705}))


def bad_default(model: Path) -> None:
    (model / "generation_config.json").write_text('{"temperature": -1}')


@pytest.mark.parametrize(
    ("spoil", "topic", "verdict", "words"),
    [
        (lambda model: None, "model", "OK", "llama, 6 layers, 8 heads over 4 KV heads, context 2048; 56 tensors"),
        (truncate, "model", "FAIL", "is truncated"),
        (other_shape, "model", "FAIL", "has the shape [704, 256], config.json asks for [705, 256]"),
        (bad_default, "model", "FAIL", "generation_config.json: temperature is -1"),
        (lambda model: (model / "config.json").unlink(), "model", "FAIL", "config.json: cannot be read"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer", "WARN", "has no tokenizer.json"),
        (lambda model: (model / "tokenizer.json").write_text("{}"), "tokenizer", "FAIL", "tokenizer.json"),
    ],
)
def test_a_checkpoint(model: Path, spoil: Callable[[Path], object], topic: str, verdict: str, words: str) -> None:
    spoil(model)
    check = by_topic(check_model(SITE, changed(model="x"), str(model)))[topic]
    assert check.verdict == verdict and words in check.found, check


def test_a_model_that_a_node_does_not_see_is_named() -> None:
    for mark, words in (("error: /m: holds no model", "rank 2 on b: /m: holds no model"), ("y", "other files on b")):
        facts = [msgspec.structs.replace(FACTS[0], model="x"), FACTS[1], *changed(model=mark)[2:]]
        check = by_topic(check_model(SITE, facts, str(MODEL)))["model on nodes"]
        assert check.verdict == "FAIL" and words in check.found


def plan_check(tmp_path: Path, text: str, model: str | None = str(MODEL), facts: list[RankFacts] = FACTS) -> Check:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return check_plan(SITE, facts, model, str(path), None)


def test_plans_are_held_against_ranks_and_memory(tmp_path: Path) -> None:
    assert plan_check(tmp_path, "mesh: {tp: 2, pp: 2}").verdict == "OK"
    check = plan_check(tmp_path, "replicas: [{stages: [{ranks: [0, 2]}]}]", facts=changed(memory_bytes=64 << 20))
    # 5.3 MiB of weights and half of 64 MiB of cache fit; the cache of the replica is the smaller rank's.
    assert check.verdict == "OK" and "tightest: rank 2 on b" in check.found and "2 rank(s) left out" in check.found
    for text, words in (
        ("mesh: {tp: 3}", "plan.yaml:1: mesh: dp 1 x pp 1 x tp 3 = 3 ranks, but the job has 4"),
        ("mesh: {tp: 4}\nnonsense: 1", "plan.yaml:2: nonsense: is no key of a plan"),
        ("mesh: {tp: 4}\nengine: {kv_cache_bytes: 1}", "1 bytes do not hold one block of"),
        ("mesh: {tp: 4}\nengine: {kv_cache_bytes: 90MiB, max_sequences: 999}", ""),
    ):
        tight = changed(memory_bytes=64 << 20)
        check = plan_check(tmp_path, text, facts=tight)
        assert check.verdict == "FAIL" and words in check.found and check.advice, check
    assert check.found.startswith("it does not fit: rank 2 on b holds") and "and may use 64.0 MiB" in check.found


def test_plans_without_a_model_are_held_against_ranks_alone(tmp_path: Path) -> None:
    assert plan_check(tmp_path, "mesh: {tp: 4}", None).verdict == "OK"
    assert plan_check(tmp_path, "replicas: [{stages: [{ranks: [3]}]}]", None).verdict == "OK"
    for text in ("mesh: {tp: 2}", "replicas: [{stages: [{ranks: [4]}]}]"):
        check = plan_check(tmp_path, text, None)
        assert check.verdict == "FAIL" and "the job has 4" in check.found


def test_the_place_for_the_output(tmp_path: Path) -> None:
    assert check_output(str(tmp_path)).verdict == "OK"
    assert list(tmp_path.iterdir()) == []
    assert check_output(str(tmp_path / "absent")).verdict == "FAIL"
    assert check_output("/proc").verdict == "FAIL"  # nobody can write there, root included


def test_the_table_wraps_and_puts_advice_below() -> None:
    text = table([Check("a", "OK", "fine"), Check("longer", "WARN", "word " * 40, "do this")]).splitlines()
    assert text[0] == "OK    a       fine"
    assert all(len(line) <= 118 for line in text)
    assert text[1].startswith("WARN  longer  word") and text[2].startswith(" " * 14 + "word")
    assert text[-1] == " " * 14 + "-> do this"


def test_numbers_and_sizes_read_well() -> None:
    assert numbers([3, 0, 1, 2, 8, 8]) == "0-3, 8"
    assert library_name("Open MPI v5.0.11, package: x, repo rev: y\nmore") == "Open MPI v5.0.11"
    assert (size(0), size(1536), size(3 << 30)) == ("0 B", "1.5 KiB", "3.0 GiB")


def examined(world: World) -> RankFacts:
    # Three threads stand for a node of two ranks and a node of one.
    world.nodes = (0, 0, 1)
    world.local_rank = (0, 1, 0)[world.rank]
    return examine(world, str(MODEL))


def test_the_examination_measures_inside_and_between_nodes() -> None:
    facts = run_local(3, examined)
    pairs = [pair for fact in facts for pair in fact.pairs]
    assert sorted((pair.first, pair.second) for pair in pairs) == [(0, 1), (0, 2)]
    assert all(pair.latency_s > 0 and pair.bytes_per_s > 0 for pair in pairs)
    assert [bool(fact.model) for fact in facts] == [True, False, True] and facts[0].model == facts[2].model
    assert sorted((group.name, tuple(group.ranks)) for fact in facts for group in fact.groups) == [
        ("job", (0, 1, 2)),
        ("node", (0, 1)),
        ("node", (2,)),
    ]
    assert all(fact.memory_bytes > 0 and fact.cores and fact.threads >= 1 for fact in facts)
    for fact in facts:
        assert Codec().decode(Codec().encode(Examined(fact))) == Examined(fact)
    site = Site(("a", "a", "b"), (0, 0, 1), Launcher("mpich", 0, 3), "MPICH")
    checks = by_topic(find(site, facts, DoctorConfig(model=str(MODEL))))
    assert {"inside nodes", "between nodes", "model on nodes", "plan"} <= set(checks)
    assert "FAIL" not in {check.verdict for check in checks.values()}, checks


def test_many_nodes_are_measured_as_a_chain_of_neighbours() -> None:
    def body(world: World) -> RankFacts:
        world.nodes = tuple(range(5))
        return examine(world)

    facts = run_local(5, body)
    assert [(pair.first, pair.second) for fact in facts for pair in fact.pairs] == [(0, 1), (1, 2), (2, 3), (3, 4)]
