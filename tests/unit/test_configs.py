"""The example plans and runs: each can be loaded, fits a model, and does what its comment says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from lepton_dist.config.generate import load_generate_config
from lepton_dist.model.registry import read_model
from lepton_dist.plan.axes import Axis, ModelShape, span_size
from lepton_dist.plan.document import load_plan, parse_plan, plan_to_yaml
from lepton_dist.plan.placement import seats
from lepton_dist.plan.plan import EngineLimits, Mesh, Plan, Precision

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = read_model(CONFIGS / "examples" / "tiny-stdlib")[0].shape
# Ranks of the job that each plan is for, and those that it leaves out.
PLANS = {
    "tensor-parallel": (4, []),
    "two-node-pipeline": (8, []),
    "data-parallel": (8, []),
    "uneven-shares": (3, []),
    "uneven-stages": (3, []),
    "mixed-replicas": (6, []),
    "weak-rank-left-out": (4, [2]),
    "small-memory": (2, []),
}
RUNS = ("example", "cluster")


def resolved(name: str, shape: ModelShape = TINY) -> Plan:
    return load_plan(CONFIGS / "plans" / f"{name}.yaml").resolve(shape, PLANS[name][0])


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (CONFIGS / "plans").iterdir()} == set(PLANS)
    assert {path.stem for path in (CONFIGS / "runs").iterdir()} == set(RUNS)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_fits_the_example_model_and_survives_a_round_trip(name: str) -> None:
    size, left_out = PLANS[name]
    plan = resolved(name)
    assert sorted(set(range(size)) - plan.ranks) == left_out
    assert all(replica.num_layers == TINY.num_layers for replica in plan.replicas)
    assert set(seats(plan, TINY)) == plan.ranks
    assert parse_plan(plan_to_yaml(plan)).resolve(TINY, size) == plan


@pytest.mark.parametrize("name", [name for name in PLANS if name != "uneven-stages"])
def test_a_plan_without_layer_numbers_fits_a_larger_model_too(name: str) -> None:
    large = ModelShape(num_layers=32, hidden=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
    assert all(replica.num_layers == 32 for replica in resolved(name, large).replicas)


def test_the_comments_of_the_plans_are_true() -> None:
    assert Plan.default([0, 0, 0, 0, 1, 1, 1, 1]).resolve(TINY, 8) == resolved("two-node-pipeline")
    held = seats(resolved("uneven-shares"), TINY)
    assert [span_size(held[rank].spans[Axis.HEADS]) for rank in range(3)] == [4, 2, 2]
    assert [len(held[rank].layers) for rank in range(3)] == [6, 6, 6]
    assert [stage.layers for stage in resolved("uneven-stages").replicas[0].stages] == [5, 1]
    assert [len(replica.ranks) for replica in resolved("mixed-replicas").replicas] == [4, 1, 1]
    engine = resolved("small-memory").engine
    assert (engine.kv_cache_bytes, engine.context_tokens) == (64 << 20, 1024)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_loads(name: str) -> None:
    config = load_generate_config(str(CONFIGS / "runs" / f"{name}.yaml"), {})
    assert config.sampling["max_tokens"] > 0


def test_the_example_run_names_what_is_there() -> None:
    config = load_generate_config(str(CONFIGS / "runs" / "example.yaml"), {"seed": 7})
    assert Path(config.model, "config.json").is_file() and Path(config.input).is_file()
    # results/ is made by the user (and by the quickstart): it lies beside configs/, where the comment says.
    assert Path(config.output).resolve() == CONFIGS.parent / "results" / "example.jsonl"
    assert (config.seed, config.sampling["temperature"]) == (7, 0.0)


def test_the_template_shows_every_setting() -> None:
    text = (CONFIGS / "runs" / "cluster.yaml").read_text()
    settings = load_generate_config(str(CONFIGS / "runs" / "cluster.yaml"), {}).__dataclass_fields__
    missing = [
        name for name in settings if name != "run_file" and f"\n{name}:" not in text and f"\n# {name}:" not in text
    ]
    assert not missing, f"configs/runs/cluster.yaml does not show {missing}"


def test_the_plan_reference_has_every_key_with_its_default() -> None:
    lines = (CONFIGS.parent / "docs" / "plan.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[3].strip(" `") for line in lines if line.startswith("| `")}
    for section, kind in (("mesh", Mesh), ("precision", Precision), ("engine", EngineLimits)):
        for field in fields(kind):
            shown = rows[f"`{section}.{field.name}`"]
            if section != "precision":  # those follow from something else, which the page says in words
                default = field.default
                assert shown == (f"{default:g}" if isinstance(default, float) else str(default).lower()), field.name
