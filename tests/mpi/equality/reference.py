"""What the text should be: transformers' logits, and an independent dense sampler in float64.

Beside each token stands its gap: by how much the best score beat the second best. Where it is below `NEAR_TIE`, two
correct programs may differ, because sums of float32 in another order differ by about 1e-6 of a logit of this size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.kernels.noise import gumbel, noise_key

NEAR_TIE = 1e-4
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Expected:
    """The ids that follow a prompt, and the gap of each."""

    ids: list[int]
    gaps: list[float]


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model, with the plainest attention."""
    torch.set_num_threads(1)  # more threads only get in the way of one another on matrices this small
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    model.requires_grad_(False)
    return model


class Reference:
    """Texts of one model."""

    def __init__(self, directory: Path) -> None:
        self.model = load_reference(directory)

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> Expected:
        """What `generate` gives without sampling."""
        output = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        best = torch.cat(output.logits).double().topk(2, dim=1).values
        return Expected(output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist())

    @torch.inference_mode()
    def sampled(self, prompt: list[int], sampling: SamplingParams, sample: int = 0) -> Expected:
        """What a dense sampler with the same noise draws from transformers' logits."""
        tokens, ids, gaps = list(prompt), list[int](), list[float]()
        cache = None
        for _ in range(sampling.max_tokens):
            new = tokens if cache is None else tokens[-1:]
            output = self.model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[0, -1].double().numpy()
            scores = perturbed_scores(logits, sampling, sample, tokens, len(prompt))
            second, best = np.sort(scores)[-2:]
            ids.append(int(scores.argmax()))
            gaps.append(float(best - second))
            tokens.append(ids[-1])
        return Expected(ids, gaps)


def perturbed_scores(
    logits: Float64, sampling: SamplingParams, sample: int, tokens: list[int], prompt_length: int
) -> Float64:
    """Scores float64 [vocab] whose largest is the token to choose: filtered logits plus the noise of this position."""
    scores = penalised(logits, sampling, tokens, prompt_length)
    if sampling.temperature == 0:
        return scores
    scores = filtered(scores / sampling.temperature, sampling)
    key = torch.tensor([noise_key(sampling.seed or 0, sample, len(tokens))], dtype=torch.int32)
    noise = gumbel(key, torch.arange(len(scores), dtype=torch.int32))[0].double().numpy()
    return np.asarray(scores + noise)


def penalised(logits: Float64, sampling: SamplingParams, tokens: list[int], prompt_length: int) -> Float64:
    """Repetition over prompt and output, then presence and frequency over the output, one token at a time."""
    result = logits.copy()
    for token in set(tokens):
        result[token] = (
            result[token] / sampling.repetition_penalty
            if result[token] > 0
            else result[token] * sampling.repetition_penalty
        )
    for token in set(tokens[prompt_length:]):
        times = tokens[prompt_length:].count(token)
        result[token] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return result


def filtered(scaled: Float64, sampling: SamplingParams) -> Float64:
    """min-p, then top-k, then top-p over what is left; -inf for what is cut. Equal scores stay or go together."""
    kept = scaled.copy()
    if sampling.min_p > 0:
        probabilities = softmax(kept)
        kept[probabilities < sampling.min_p * probabilities.max()] = -np.inf
    if 0 < sampling.top_k < len(kept):
        kept[kept < np.sort(kept)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        probabilities = softmax(kept)
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        kept[kept < kept[order[before < sampling.top_p]].min()] = -np.inf
    return np.asarray(kept)


def softmax(scores: Float64) -> Float64:
    """Probabilities float64 [vocab]."""
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())
