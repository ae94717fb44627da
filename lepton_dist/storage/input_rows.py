"""What the rows of an input are, by content: so that an output can be resumed with an input that has changed.

A row that has an answer must still be the row that was answered; all others may be corrected, added or taken out.
``OUTPUT.job.rows`` keeps two hashes of 8 bytes for each row of the input, of its key and of its line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_dist.errors import OutputError
from lepton_dist.storage.durable import replace_file

Hashes = npt.NDArray[np.uint64]
KeyOfLine = Callable[[bytes, int], str]
"""From a line that is not blank, and its number, to the key that its row has unless an earlier row has it."""

_MAGIC = b"lepton-dist input rows 1\n"
_DIGEST_BYTES = 32
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, eq=False)
class InputRows:
    """The rows of an input.

    Attributes:
        digest: the SHA-256 of the whole file, in hexadecimal.
        keys, contents: of each row, [rows]; a key that occurs again counts where it is first.
    """

    digest: str
    keys: Hashes
    contents: Hashes

    def __len__(self) -> int:
        return len(self.keys)

    def contents_of(self, keys: Hashes) -> tuple[Hashes, npt.NDArray[np.bool_]]:
        """The contents of some keys, and which of them are here at all; both [keys]."""
        if not len(self.keys):
            return np.zeros(len(keys), np.uint64), np.zeros(len(keys), np.bool_)
        order = np.argsort(self.keys, kind="stable")  # of equal keys the first row comes first
        places = np.searchsorted(self.keys[order], keys)
        rows = order[np.minimum(places, len(order) - 1)]
        found: npt.NDArray[np.bool_] = self.keys[rows] == keys
        return self.contents[rows], found


def survey(lines: Iterable[bytes], key_of_line: KeyOfLine) -> InputRows:
    """Read an input once: its digest, and the hashes of every row. 16 bytes of memory a row."""
    digest = hashlib.sha256()
    keys, contents = bytearray(), bytearray()
    for number, line in enumerate(lines, start=1):
        digest.update(line)
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            keys += _hash(key_of_line(content, number).encode("utf-8", "surrogatepass"))
            # Without its end: the last line of a file gets one when rows are added.
            contents += _hash(content.rstrip(b"\r\n"))
    return InputRows(digest.hexdigest(), np.frombuffer(keys, np.uint64), np.frombuffer(contents, np.uint64))


def hash_keys(keys: Iterable[str]) -> Hashes:
    """The hashes of keys, as `InputRows` holds them."""
    return np.frombuffer(b"".join(_hash(key.encode("utf-8", "surrogatepass")) for key in keys), np.uint64)


def compare(before: InputRows, now: InputRows, answered: Hashes) -> tuple[int, int]:
    """Of the rows with these keys: how many are another row now than before, and how many the input no longer has."""
    old, was_there = before.contents_of(answered)
    new, is_there = now.contents_of(answered)
    changed = is_there & (~was_there | (old != new))
    return int(changed.sum()), int((was_there & ~is_there).sum())


def write_input_rows(path: Path, rows: InputRows) -> None:
    """Replace the file in one step; syncing its directory is left to the caller.

    Raises:
        OSError: the old one is as it was.
    """
    data = [_MAGIC, bytes.fromhex(rows.digest), rows.keys.tobytes(), rows.contents.tobytes()]
    replace_file(path, data, syncs_directory=False)


def read_input_rows(path: Path) -> InputRows | None:
    """The rows, or None where the file is absent.

    Raises:
        OutputError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    start = len(_MAGIC) + _DIGEST_BYTES
    if not data.startswith(_MAGIC) or len(data) < start or (len(data) - start) % 16:
        raise OutputError(f"{path}: is not what a run writes there; start anew with --overwrite")
    numbers = np.frombuffer(data, np.uint64, offset=start) if len(data) > start else np.zeros(0, np.uint64)
    half = len(numbers) // 2
    return InputRows(data[len(_MAGIC) : start].hex(), numbers[:half], numbers[half:])


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
