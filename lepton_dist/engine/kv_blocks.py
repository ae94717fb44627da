"""Bookkeeping of KV blocks: who holds which, and which hold a prefix that others can reuse. Pure.

A full block is known by a hash chained over all the tokens up to its end, so equal keys mean equal prefixes
(automatic prefix caching as in vLLM). Freed blocks keep their content until they are needed, oldest first; those
without a prefix go first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq

from lepton_dist.engine.request import Sequence


class KvBlocks:
    """`num_blocks` blocks of `block_tokens` tokens."""

    def __init__(self, num_blocks: int, block_tokens: int, *, has_prefix_cache: bool = True) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._has_prefix_cache = has_prefix_cache
        self._holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; some still keep a prefix."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence take."""
        return -(-num_tokens // self.block_tokens)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that the sequence lacks to hold `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(sequence.block_table))

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for `num_tokens` tokens; False, and nothing changed, when too few are free."""
        count = self.missing(sequence, num_tokens)
        if count > len(self._free):
            return False
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._holders[block] = 1
            sequence.block_table.append(block)
        return True

    def reuse_prefix(self, sequence: Sequence) -> None:
        """Start a sequence on the blocks that already hold its beginning; its last token is always computed anew."""
        if not self._has_prefix_cache or sequence.is_secluded or sequence.wants_prompt_logprobs:
            return
        usable = (len(sequence.tokens) - 1) // self.block_tokens
        keys = self._extend_keys(sequence, usable)
        for key in keys[:usable]:
            block = self._block_of.get(key)
            if block is None:
                break
            self._free.pop(block, None)
            self._holders[block] += 1
            sequence.block_table.append(block)
        sequence.num_published = len(sequence.block_table)
        sequence.num_computed = sequence.num_published * self.block_tokens

    def publish(self, sequence: Sequence) -> None:
        """Offer the blocks that have become full for reuse. Stages run batches in order: being scheduled is enough."""
        if not self._has_prefix_cache or sequence.is_secluded:
            return
        full = min(sequence.num_computed, len(sequence.tokens)) // self.block_tokens  # a pending token has no hash yet
        if full <= sequence.num_published:
            return
        keys = self._extend_keys(sequence, full)
        for index in range(sequence.num_published, full):
            block, key = sequence.block_table[index], keys[index]
            if self._key_of[block] is None and key not in self._block_of:
                self._key_of[block] = key
                self._block_of[key] = block
        sequence.num_published = full

    def withdraw(self, sequence: Sequence) -> None:
        """Offer none of the sequence's blocks any longer, whoever has computed them: they may hold NaN."""
        for block in sequence.block_table:
            self._forget(block)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back; the last ones are the first to be used again, so that prefixes live longest."""
        for block in reversed(sequence.block_table):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if self._key_of[block] is None:  # nothing to keep, and its memory is warm: the next to be used
                    self._free.move_to_end(block, last=False)
        del sequence.block_table[:]
        sequence.num_computed = sequence.num_published = 0

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None

    def _extend_keys(self, sequence: Sequence, count: int) -> Seq[bytes]:
        """The chained keys of the sequence's first `count` full blocks (tokens never change, so keys are kept)."""
        keys = sequence.block_keys
        while len(keys) < count:
            start = len(keys) * self.block_tokens
            before = keys[-1] if keys else (b"long" if sequence.is_long else b"")
            data = array("i", sequence.tokens[start : start + self.block_tokens]).tobytes()
            keys.append(hashlib.blake2b(data, key=before, digest_size=16).digest())
        return keys
