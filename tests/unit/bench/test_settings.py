"""Names of settings, the benchmark's workload, and the models that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_dist.bench.settings import parse_setting
from lepton_dist.bench.shapes import shaped_model
from lepton_dist.bench.workload import make_requests, offline_lengths
from lepton_dist.errors import UsageError
from lepton_dist.model.registry import read_model
from lepton_dist.parallel.requirements import parameter_table
from lepton_dist.plan.plan import Mesh, Plan, Precision
from lepton_dist.storage.index import CheckpointIndex


def test_a_mesh_smaller_than_the_job_uses_its_first_ranks() -> None:
    setting = parse_setting("dp2+tp2+fp32", 6)
    assert setting.precision == Precision("float32", "float32", "float32")
    assert setting.plan is not None
    assert [replica.ranks for replica in setting.plan.replicas] == [(0, 1), (2, 3)]
    assert all(len(replica.stages) == 1 for replica in setting.plan.replicas)


def test_plain_is_rank_0_alone_and_plan_is_the_given_one() -> None:
    plain = parse_setting("plain", 4).plan
    assert plain is not None
    assert plain.ranks == {0}
    assert parse_setting("plan+bf16", 4).plan is None


def test_a_precision_goes_over_the_plans() -> None:
    given = Plan(precision=Precision(weights="bfloat16", kv_cache="float32"), mesh=Mesh(tp=2))
    plan = parse_setting("wire-int8", 2).over(given)
    assert (plan.mesh, plan.precision) == (Mesh(tp=2), Precision("bfloat16", "float32", "int8"))
    assert parse_setting("int8+bf16", 1).over(given).precision == Precision("int8", "bfloat16", "bfloat16")
    assert parse_setting("pp2+wire-int8", 2).over(given).precision == Precision(wire="int8")


def test_sums_may_be_waited_for() -> None:
    assert parse_setting("tp2+wire-int8", 2).over(Plan(mesh=Mesh(tp=2))).engine.overlap
    assert not parse_setting("tp2+wire-int8+no-overlap", 2).over(Plan(mesh=Mesh(tp=2))).engine.overlap
    assert not parse_setting("no-overlap", 2).over(Plan(mesh=Mesh(tp=2))).engine.overlap


@pytest.mark.parametrize(
    ("text", "problem"), [("tp3", "needs 3 ranks, the job has 2"), ("fast", "'fast' is unknown"), ("tp0", "'tp0'")]
)
def test_a_wrong_setting_is_named(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_setting(text, 2)


def test_the_offline_batch_is_what_the_documentation_says() -> None:
    lengths = offline_lengths()
    assert len(lengths) == 64
    assert lengths == offline_lengths()
    assert all(16 <= item.prompt <= 512 and 8 <= item.output <= 128 for item in lengths)
    requests = make_requests(lengths, 100, seed=1)
    assert [len(request.prompt) for request in requests] == [item.prompt for item in lengths]
    assert len({request.key for request in requests}) == 64


def test_a_made_model_is_a_whole_checkpoint_and_is_kept(tmp_path: Path) -> None:
    directory = shaped_model("tiny", tmp_path)
    config, family = read_model(directory)
    parameter_table(CheckpointIndex.read(directory), config, family)
    made = (directory / "model.safetensors").stat().st_mtime_ns
    assert shaped_model("tiny", tmp_path) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(UsageError, match="unknown"):
        shaped_model("9000b", tmp_path)
