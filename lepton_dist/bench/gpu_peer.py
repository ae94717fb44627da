"""Hugging Face transformers' continuous batching on the same workload: the yardstick on a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch

from lepton_dist.bench.shapes import SHAPES, shape_config
from lepton_dist.bench.workload import Lengths, make_prompts
from lepton_dist.errors import LeptonError

_TIMEOUT_S = 240.0


def transformers_rate(shape: str, device: str, lengths: list[Lengths]) -> float:
    """Tokens/s of output of its continuous batching, greedy, with a model of random weights in bfloat16.

    Raises:
        LeptonError: it did not finish every request.
    """
    model = _model(shape, device)
    seconds = 0.0
    for turn in (0, 1):  # the first warms up
        prompts = make_prompts(lengths, SHAPES[shape].vocab, seed=turn)
        seconds = _run(model, prompts, lengths)
    return sum(item.output for item in lengths) / seconds


def _model(shape: str, device: str) -> Any:
    """The model: transformers has no types worth naming."""
    import transformers  # seconds of import, paid by this case only

    library: Any = transformers
    fields = {name: value for name, value in shape_config(SHAPES[shape]).items() if name != "architectures"}
    config = library.LlamaConfig(**fields)
    with torch.device(device):
        made = library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return made.train(False)


def _run(model: Any, prompts: list[list[int]], lengths: list[Lengths]) -> float:
    """Seconds from the first request handed over to the last one finished."""
    import transformers

    library: Any = transformers
    # No token ends a text: the lengths are the workload's.
    config = library.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    left = len(prompts)
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        start = time.perf_counter()
        for prompt, item in zip(prompts, lengths, strict=True):
            manager.add_request(prompt, max_new_tokens=item.output)
        while left and time.perf_counter() - start < _TIMEOUT_S:
            result = manager.get_result(timeout=1.0)
            left -= result is not None and result.is_finished()
        seconds = time.perf_counter() - start
    if left:
        raise LeptonError(f"transformers did not finish {left} of {len(prompts)} requests within {_TIMEOUT_S:g} s")
    return seconds
