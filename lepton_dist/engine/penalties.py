"""Repetition, presence and frequency penalties on a vocabulary shard."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.engine.batch import Int32, read_int32
from lepton_dist.kernels.upload import upload


def apply_penalties(
    logits: torch.Tensor, settings: NDArray[np.float32], counts: Int32, history: bytes, first: int
) -> None:
    """Change logits float32 [r, vocab/tp] in place; `settings` and `counts` as in `SampleRows`.

    The repetition penalty (arXiv:1909.05858) is on every token of prompt and output, the presence and frequency
    penalties (OpenAI) are on the output's.
    """
    tokens = read_int32(history)
    start = 0
    for row in np.flatnonzero(counts[:, 2]):
        prompt, output = int(counts[row, 2]), int(counts[row, 3])
        seen = _local(tokens[start : start + prompt + output], first, logits.shape[1])
        written, times = np.unique(
            _local(tokens[start + prompt : start + prompt + output], first, logits.shape[1]), return_counts=True
        )
        start += prompt + output
        repetition, presence, frequency = settings[row, 3:6].tolist()
        index = upload(np.unique(seen), logits.device)
        values = logits[row, index]
        logits[row, index] = torch.where(values > 0, values / repetition, values * repetition)
        penalty = presence + frequency * torch.from_numpy(times).float()
        logits[row, upload(written, logits.device)] -= upload(penalty.numpy(), logits.device)


def _local(tokens: Int32, first: int, size: int) -> np.ndarray:
    """Those of the tokens that this shard holds, as int64 positions in it."""
    local = tokens.astype(np.int64) - first
    return local[(local >= 0) & (local < size)]
