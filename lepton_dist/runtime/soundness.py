"""Whether the model gives numbers at all: rows that fail are held back until one comes through, or a probe tells."""

from __future__ import annotations

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.request import Request
from lepton_dist.text.completion import RequestOutput

_NUM_PROBES = 8
_PREFIX = "probe:"  # no row's key begins so: those of rows say what kind of id they have


class Soundness:
    """State in, decision out.

    A row whose logits are not numbers may have met a broken value that others never meet. Where no row has come through
    yet, prompts of single tokens from all over the vocabulary, of `vocab` tokens, are run: a model that has no numbers
    for any of them is broken itself, and then no row has failed. `turn` tells its probes from those of others before.
    """

    def __init__(self, vocab: int, turn: int = 0) -> None:
        self._vocab, self._turn = vocab, turn
        self._probes: set[str] | None = None  # under way; None before they are run
        self._is_sound = False
        self._withheld: list[tuple[str, RequestOutput]] = []

    @staticmethod
    def is_probe(key: str) -> bool:
        """Whether this is no row, but a probe."""
        return key.startswith(_PREFIX)

    @property
    def is_broken(self) -> bool:
        """Whether the model has no numbers for any prompt."""
        return self._probes is not None and not self._probes and not self._is_sound

    @property
    def num_withheld(self) -> int:
        """Rows that have failed and are held back."""
        return len(self._withheld)

    def ended(self, key: str, output: RequestOutput) -> list[tuple[str, RequestOutput]]:
        """A row or a probe has come to its end; returns the rows that can now be told."""
        self._is_sound |= not output.failure
        if not self.is_probe(key):
            self._withheld.append((key, output))
        elif self._probes is not None:
            self._probes.discard(key)
        if not self._is_sound:
            return []
        told, self._withheld = self._withheld, []
        return told

    def probes(self) -> list[Request]:
        """The probes to run now: once, when a row is held back."""
        if not self._withheld or self._probes is not None:
            return []
        tokens = sorted({index * self._vocab // _NUM_PROBES for index in range(_NUM_PROBES)})
        # Each ends with its first token, whatever that is.
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, seed=0)
        probes = [Request(f"{_PREFIX}{self._turn}:{token}", [token], sampling) for token in tokens]
        self._probes = {probe.key for probe in probes}
        return probes

    def anew(self) -> Soundness:
        """What goes on when rows are given up: those held back are not told, and their probes count for nothing."""
        return self if self._is_sound else Soundness(self._vocab, self._turn + 1)
