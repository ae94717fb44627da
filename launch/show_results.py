"""Print the first results of a batch beside their prompts, and say where the rest lie. For launch/quickstart."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

NUM_SHOWN = 8


def prompts_by_id(path: Path) -> dict[str, str]:
    """The plain prompts of a JSONL file by id; rows of other kinds are left out."""
    prompts: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            prompts[str(row.get("id"))] = row["prompt"]
    return prompts


def main(input_path: str, output_path: str) -> None:
    """Print up to NUM_SHOWN rows of the output: the prompt, then what the model made of it."""
    prompts = prompts_by_id(Path(input_path))
    with Path(output_path).open(encoding="utf-8") as lines:
        for line in islice(lines, NUM_SHOWN):
            row = json.loads(line)
            name = row.get("id", row.get("custom_id"))
            shown = row.get("text", row.get("error") or row.get("choices") or row.get("response"))
            print(f"--- {name}\n{prompts.get(str(name), '')}{shown}")
    print(f"---\nresults: {Path(output_path).resolve()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
