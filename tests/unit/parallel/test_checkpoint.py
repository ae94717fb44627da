"""What a checkpoint's files together decide, and that another rank is told all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lepton_dist.errors import CheckpointError
from lepton_dist.parallel.checkpoint import Checkpoint, planned_config
from tests.checkpoints import llama_config, random_tensors, save_tensors, write_random


def names(checkpoint: Checkpoint) -> set[str]:
    """The tensors that a single rank would read."""
    layers = range(checkpoint.config.shape.num_layers)
    return {part.tensor for parameter in checkpoint.table.of_stage(layers) for part in parameter.parts}


def test_a_head_of_its_own_is_used_though_the_configuration_ties_it(tmp_path: Path) -> None:
    untied = Checkpoint.read(write_random(tmp_path / "untied"))
    tied = Checkpoint.read(write_random(tmp_path / "tied", tie_word_embeddings=True))
    assert untied.notice == ""
    assert str(tmp_path / "tied") in tied.notice and "lm_head.weight" in tied.notice
    assert not tied.config.is_tied
    assert names(tied) == names(untied)


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.embed_tokens.weight"])
def test_of_a_tied_pair_one_is_enough(missing: str, tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors[missing]
    save_tensors(tmp_path / "model.safetensors", tensors)
    for is_tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps(llama_config(96, 32, 64, 2, tie_word_embeddings=is_tied)))
        if not is_tied:
            with pytest.raises(CheckpointError, match=f"lack the tensor '{missing}'"):
                Checkpoint.read(tmp_path)
            continue
        checkpoint = Checkpoint.read(tmp_path)
        assert (checkpoint.config.is_tied, checkpoint.notice) == (True, "")
        assert names(checkpoint) == set(tensors)


def test_the_dtype_is_the_weights_where_it_is_not_said(tmp_path: Path) -> None:
    for number, said in enumerate(({"torch_dtype": None}, {"dtype": "auto", "torch_dtype": None})):
        folder = write_random(tmp_path / str(number), stored="BF16", **said)
        assert Checkpoint.read(folder).config.dtype == planned_config(folder).dtype == "bfloat16"
    folder = write_random(tmp_path / "said", stored="BF16", torch_dtype="float32")
    assert Checkpoint.read(folder).config.dtype == "float32"
    (folder / "model.safetensors").unlink()
    assert planned_config(folder).dtype == "float32"


def test_another_rank_is_told_all_of_it(tmp_path: Path) -> None:
    folder = write_random(tmp_path, tie_word_embeddings=True, torch_dtype=None, unread=10**30, name="ü\ud800")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    read = Checkpoint.read(folder)
    data = read.packed()
    for path in folder.iterdir():
        path.unlink()
    told = Checkpoint.unpacked(folder, data)
    assert told.config == read.config
    assert told.config.eos_token_ids == (7, 8)
    assert told.index.tensors == read.index.tensors
    assert names(told) == names(read)
