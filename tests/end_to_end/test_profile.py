"""`lepton-dist profile` as a user starts it: under mpirun, into a file that the next command reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_dist.coordinator.cluster_document import read_cluster
from tests.harness import run

PROFILE = ["-m", "lepton_dist.cli.main", "profile"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_a_job_is_measured_within_a_minute(ranks: int | None, tmp_path: Path) -> None:
    output = tmp_path / "new" / "here.yaml"
    job = run([*PROFILE, "--name", "here", "--output", output], ranks=ranks, seconds=60)
    assert job.returncode == 0 and job.left == (), job.report()
    assert str(output) in job.stdout and "rank(s) on 1 node(s)" in job.stdout, job.report()
    cluster = read_cluster(output)
    cluster.check([0] * (ranks or 1))
    assert cluster.name == "here" and len(cluster.ranks) == (ranks or 1)
    assert (cluster.within_reduce is not None) == (ranks == 2)
    if ranks == 2:
        assert cluster.within_node.latency_s < 1e-2
        assert cluster.all_reduce_s([0, 1], 4096) > 0


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    job = run([*PROFILE, "--name", "here", "--output", tmp_path / "file" / "here.yaml"], seconds=60)
    assert job.returncode == 2 and "cannot be written" in job.stderr, job.report()
    assert "Traceback" not in job.stderr and job.seconds < 20, job.report()
