"""The Python API as a script uses it, alone and under mpirun; and what idle ranks cost."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.rig import MODEL, copy_model, edit_json, write_rows
from tests.harness import run, started

SLOW = pytest.mark.slow

SCRIPT = """
import sys
from lepton_dist import LeptonInference, SamplingParams, load_dataset

dataset = load_dataset(sys.argv[1])
inference = LeptonInference(model_path=sys.argv[2], dtype="float32", threads=1)
inference.set_batch_size(2)
inference.set_dynamic_scheduling(True)
sampling = SamplingParams(max_tokens=8, temperature=0.7)
texts = inference.generate_texts(dataset, epochs=2, dynamic_scheduling=True, parallel=True, sampling=sampling)
rounded = inference.generate_texts(dataset, quantization=True, sampling=SamplingParams(max_tokens=8, temperature=0))
assert len(rounded) == 3 and inference.generate_texts(dataset, epochs=2, sampling=sampling) == texts
again = inference.generate_texts(["import os"], parallel=False, sampling=SamplingParams(max_tokens=8, temperature=0))
inference.set_dynamic_scheduling(False)
assert inference.generate_texts(dataset, epochs=2, sampling=sampling) == texts
print(repr((texts, again)))
"""

IDLE = """
import time
from lepton_dist.runtime.run import run

def program(controller, interrupts):
    print("ready", flush=True)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        controller.advance()
    return 0

run(program)
"""


def test_a_script_gives_the_same_texts_on_any_number_of_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "def f(x):"}, {"prompt": "class A"}, {"prompt": "for i"}])
    alone = run([script, source, MODEL])
    assert alone.returncode == 0, alone.report()
    texts, again = eval(alone.stdout)  # noqa: S307  our own script's repr
    assert len(texts) == 6 and len(again) == 1
    assert texts[:3] != texts[3:]  # each pass draws its own samples
    together = run([script, source, MODEL], ranks=3)
    assert together.returncode == 0 and not together.left, together.report()
    assert together.stdout == alone.stdout


@pytest.mark.parametrize("ending", ["raise ValueError('boom')", "sys.exit(5)"])
def test_workers_leave_with_a_script_that_fails(ending: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nfrom lepton_dist import LeptonInference\nLeptonInference(sys.argv[1])\n{ending}\n")
    job = run([script, MODEL], ranks=2, seconds=30)
    assert job.returncode == (5 if "exit" in ending else 1), job.report()
    assert not job.left, job.report()


def test_unsupported_settings_are_refused_by_name(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom lepton_dist import LeptonInference\nfrom lepton_dist.errors import UsageError\n"
        "try:\n    LeptonInference(sys.argv[1]).generate_texts(['x'], pruning=True)\n"
        "except UsageError as error:\n    print(error)\n"
    )
    job = run([script, MODEL])
    assert job.returncode == 0 and "pruning is not supported" in job.stdout, job.report()


NOTEBOOK = """
import os, signal, sys, threading
import psutil
from lepton_dist import LeptonInference, SamplingParams, load_dataset
from lepton_dist.errors import LeptonError, RequestError

good, bad, spoilt, rows = sys.argv[1:5]
short, long = SamplingParams(max_tokens=2, temperature=0), SamplingParams(max_tokens=1500, ignore_eos=True)
inference = LeptonInference(good, threads=1)
want = inference.generate_texts(["import os\\n"], sampling=short)
sizes = []
for turn in range(int(sys.argv[5])):
    stop = threading.Timer(0.1 + 0.03 * (turn % 10), lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        stop.start()
        inference.generate_texts(["def f("] * 64, sampling=long)
        raise SystemExit("the call ended before its interrupt")
    except KeyboardInterrupt:
        pass
    for model, prompts, words in (
        (bad, ["x"], "hidden_size"), (spoilt, ["x"], "NaN"), (good, load_dataset(rows), "context"), (good, "x", "list")
    ):
        try:
            inference.load_model(model)
            inference.generate_texts(prompts, sampling=short)
            raise SystemExit(f"{model} was taken")
        except LeptonError as error:
            assert words in str(error), error
    if turn % 5 == 4:
        inference = LeptonInference(good, threads=1)
    inference.load_model(good)
    assert inference.generate_texts(["import os\\n"], sampling=short) == want
    sizes.append(psutil.Process().memory_info().rss)
print("went on", max(sizes[len(sizes) // 2:]) - max(sizes[:len(sizes) // 2]))
"""


@pytest.mark.parametrize(
    ("ranks", "turns"), [(None, 6), (2, 2), pytest.param(None, 20, marks=SLOW), pytest.param(2, 20, marks=SLOW)]
)
def test_a_session_goes_on_after_interrupts_errors_and_bad_models(
    ranks: int | None, turns: int, tmp_path: Path
) -> None:
    """What a notebook does all day: it stops a call, names a wrong model, and then asks the same object again."""
    bad, spoilt = copy_model(tmp_path / "bad"), copy_model(tmp_path / "spoilt")
    edit_json(bad / "config.json", hidden_size="many")
    spoil_norm(spoilt)
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}, {"prompt_token_ids": [5] * 3000}])
    script = tmp_path / "script.py"
    script.write_text(NOTEBOOK)
    job = run([script, MODEL, bad, spoilt, rows, str(turns)], ranks=ranks, seconds=600)
    assert job.returncode == 0 and not job.left, job.report()
    assert "went on" in job.stdout, job.report()
    if turns == 20:
        assert int(job.stdout.split()[-1]) < 32 << 20, job.report()  # memory is flat: a model of it is 22 MB


def spoil_norm(model: Path) -> None:
    """Put a NaN into the last norm of a copy of the model: it has no numbers for any prompt."""
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    norm = json.loads(data[8 : 8 + length])["model.norm.weight"]
    start = 8 + length + norm["data_offsets"][0]
    data[start : start + 4] = b"\xc0\x7f\xc0\x7f" if norm["dtype"] == "BF16" else b"\x00\x00\xc0\x7f"
    path.write_bytes(data)


def test_an_idle_rank_uses_under_3_per_cent_of_a_core(tmp_path: Path) -> None:
    script = tmp_path / "idle.py"
    script.write_text(IDLE)
    with started([script], ranks=2) as job:
        while "ready" not in job.stdout:
            assert job.process.poll() is None, job.stderr
            time.sleep(0.05)
        time.sleep(1.0)  # the first polls come quickly one after the other
        ranks = [psutil.Process(pid) for pid in job.pids()]
        ranks = [rank for rank in ranks if "python" in rank.name()]
        before = [sum(rank.cpu_times()[:2]) for rank in ranks]
        seconds = 4.0
        time.sleep(seconds)
        used = [(sum(rank.cpu_times()[:2]) - start) / seconds for rank, start in zip(ranks, before, strict=True)]
    assert len(used) >= 2
    assert max(used) < 0.03, used
