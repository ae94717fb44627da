"""What a large input costs before and beside loading: `python -m tests.measurements.inputs`, a million rows of 1 KB."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from lepton_dist.storage.input_rows import survey
from lepton_dist.text.dialects import key_of_input, open_input

_NUM_ROWS = 1_000_000

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.jsonl"
        with path.open("w") as stream:
            for number in range(_NUM_ROWS):
                stream.write(f'{{"id": "row-{number:012}", "prompt": "{"x" * 960}"}}\n')
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start_s = time.process_time()
        with open_input(path) as lines:
            rows = survey(lines, key_of_input)
        used_s = time.process_time() - start_s
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        size = path.stat().st_size >> 20
        print(f"{len(rows)} rows of {size} MiB: {used_s:.2f} s of processor time, {more >> 10} MiB of memory")
