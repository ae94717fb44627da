"""Weights that are no numbers: in a token's embedding they cost the rows that meet it, in a norm the run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.rig import by_key, copy_model, generate, read_rows, write_rows
from tests.end_to_end.rig import plan as write_plan
from tests.harness import run
from tests.mpi.equality.models import MODELS, make_model

ROWS = [{"id": index, "prompt_token_ids": [3, 4, 5 + index], "max_tokens": 4, "temperature": 0} for index in range(12)]
SCRIPT = """
import sys
from lepton_dist import LeptonInference, SamplingParams, load_dataset
from lepton_dist.errors import CheckpointError, RequestError

greedy = SamplingParams(max_tokens=4, temperature=0)
inference = LeptonInference(sys.argv[1], threads=1)
for source in sys.argv[2:]:
    try:
        print(inference.generate_texts(load_dataset(source), sampling=greedy))
    except (CheckpointError, RequestError) as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(MODELS[0], tmp_path_factory.mktemp("model"))


def spoil(model: Path, target: Path, name: str, row: int) -> Path:
    """A copy of a checkpoint in one file, with a row of a tensor that is no number."""
    target.mkdir()
    tensors = {key: value for file in model.glob("*.safetensors") for key, value in load_file(file).items()}
    tensors[name][row] = torch.nan
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((model / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("mesh", ["dp: 2", pytest.param("tp: 2", marks=pytest.mark.slow)])
def test_a_row_that_meets_one_is_an_error_row_and_the_others_are_answered(
    mesh: str, model: Path, tmp_path: Path
) -> None:
    source, plan = write_rows(tmp_path / "in.jsonl", ROWS), write_plan(tmp_path / "plan.yaml", mesh)
    options = ("--plan", plan, "--threads", "1")
    assert run(generate(model, source, tmp_path / "sound.jsonl", "--threads", "1")).returncode == 0
    spoilt = spoil(model, tmp_path / "spoilt", "model.embed_tokens.weight", 7)
    job = run(generate(spoilt, source, tmp_path / "out.jsonl", *options), ranks=2)
    assert job.returncode == 3 and "Traceback" not in job.stderr, job.report()
    sound, found = (by_key(read_rows(tmp_path / name)) for name in ("sound.jsonl", "out.jsonl"))
    failed = {key for key, row in sound.items() if key == "2" or 7 in row["token_ids"][:-1]}
    assert {key for key, row in found.items() if "error" in row} == failed and len(failed) < 6
    assert {key: row for key, row in found.items() if key not in failed} == {
        key: row for key, row in sound.items() if key not in failed
    }
    assert found["2"]["error"]["type"] == "server_error" and "not numbers" in found["2"]["error"]["message"]
    again = run(generate(spoilt, source, tmp_path / "out.jsonl", *options), ranks=2)
    assert again.returncode == 3 and "was complete already" in again.stderr, again.report()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_model_that_gives_no_numbers_is_refused_by_the_name_of_the_tensor(
    dtype: str, model: Path, tmp_path: Path
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    name = "model.layers.1.post_attention_layernorm.weight"
    job = run(generate(spoil(model, tmp_path / "spoilt", name, 3), source, output, "--dtype", dtype), ranks=2)
    assert job.returncode == 2 and not job.left, job.report()
    assert name in job.stderr and "[3]" in job.stderr and "Traceback" not in job.stderr
    assert read_rows(output) == []


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_session_of_python_goes_on_behind_it(ranks: int | None, tmp_path: Path) -> None:
    spoilt = copy_model(tmp_path / "model")
    tensors = load_file(spoilt / "model.safetensors")
    # A head of its own, so that only prompts meet the broken row.
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    tensors["model.embed_tokens.weight"][4000] = torch.nan
    save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
    config = (spoilt / "config.json").read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    (spoilt / "config.json").write_text(config)
    good = write_rows(tmp_path / "good.jsonl", [{"prompt_token_ids": [30, 40]}, {"prompt_token_ids": [50]}])
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt_token_ids": [3]}, {"id": "that", "prompt_token_ids": [3, 4000]}])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    job = run([script, spoilt, bad, good, bad, good], ranks=ranks)
    assert job.returncode == 0 and not job.left, job.report()
    lines = job.stdout.splitlines()
    assert len(lines) == 4 and lines[0] == lines[2] and lines[1] == lines[3], lines
    assert lines[0].startswith("RequestError row 'that' (line 2)") and "not numbers" in lines[0]
    assert lines[1].startswith("[")
