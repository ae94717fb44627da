"""What a process tells of its GPUs, staging, and waiting for a GPU: all that needs no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lepton_dist.comm.devices import MOST_GPUS, SIGHT_WORDS, gpu_id, nccl_problem, pack_sight, unpack_sight
from lepton_dist.comm.gpu_wait import GpuWait
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.world import World, run_local
from lepton_dist.errors import RankLostError
from lepton_dist.plan.devices import Sight

WORD = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.tuples(WORD, WORD), max_size=MOST_GPUS), st.booleans())
def test_a_sight_survives_the_journey(gpus: list[tuple[int, int]], has_nccl: bool) -> None:
    words = torch.tensor(pack_sight(Sight(tuple(gpus), has_nccl)))
    assert words.numel() == SIGHT_WORDS and unpack_sight(words.tolist()) == Sight(tuple(gpus), has_nccl)


def test_uuids_in_every_spelling_are_the_same_gpu() -> None:
    plain = "0123456789abcdeffedcba9876543210"
    dashed = "01234567-89ab-cdef-fedc-ba9876543210"
    assert gpu_id(plain) == gpu_id(dashed) == gpu_id(f"GPU-{dashed}") == gpu_id(f"MIG-{dashed}")
    assert gpu_id(f"MIG-GPU-{dashed}/1/0") == gpu_id(plain)  # drivers before R470
    assert gpu_id(plain) == (0x0123456789ABCDEF, 0xFEDCBA9876543210 - 2**64)
    with pytest.raises(ValueError, match="32 hexadecimal digits are wanted, these are 4"):
        gpu_id("GPU-abcd")


def test_no_gpu_tensor_passes_a_group_that_serves_none() -> None:
    def body(world: World) -> str:
        group = world.group(range(2), "pair")
        with pytest.raises(TypeError, match="only CPU tensors are carried"):
            group.all_reduce(torch.empty(3, device="meta"))
        with pytest.raises(TypeError, match="only CPU tensors are carried"):
            group.isend(torch.empty(3, device="meta"), 1 - world.rank)
        return str(group.gpu_transport)

    assert run_local(2, body) == ["None", "None"]


class Link:
    def __init__(self, failure: str) -> None:
        self.message, self.is_aborted = failure, False

    def failure(self) -> str:
        return self.message

    def abort(self) -> None:
        self.is_aborted = True


class Event:
    """As torch.cuda.Event, of work that is done after so many questions."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_waiting_ends_with_the_work() -> None:
    wait, link = GpuWait(Patience(5.0, "stepping"), "the GPU of rank 3", lambda: None), Link("")
    wait.watch([link])
    wait.until(Event(200), "step 7")  # type: ignore[arg-type]
    assert not link.is_aborted


def test_a_broken_link_ends_the_wait_at_once_and_is_aborted() -> None:
    sound, broken = Link(""), Link("NCCL: gone")
    wait = GpuWait(Patience(60.0, "stepping"), "the GPU of rank 3", lambda: None)
    wait.watch([sound, broken])
    with pytest.raises(RankLostError, match="while stepping: NCCL: gone"):
        wait.until(Event(10**9), "step 7")  # type: ignore[arg-type]
    assert sound.is_aborted and broken.is_aborted


def test_a_gpu_that_never_ends_is_an_error_after_the_deadline() -> None:
    calls: list[int] = []
    wait, link = GpuWait(Patience(0.05, "stepping"), "the GPU of rank 3", lambda: calls.append(1)), Link("")
    wait.watch([link])
    with pytest.raises(RankLostError, match=r"while stepping: waited 0\.05 s for the GPU of rank 3 to end step 7"):
        wait.until(Event(10**9), "step 7")  # type: ignore[arg-type]
    assert link.is_aborted and calls


def test_without_a_gpu_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, lepton_dist.runtime.run, lepton_dist.bench.doctor, lepton_dist.comm.devices as devices\n"
        "assert devices.see_gpus() == devices.Sight() or devices.has_gpus()\n"
        "names = {'cupy', 'lepton_dist.kernels.cuda.fused', 'lepton_dist.comm.transports.nccl'}\n"
        "loaded = names & set(sys.modules)  # triton is left out: torch itself looks for it\n"
        "assert devices.has_gpus() or not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_nccl_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert nccl_problem().startswith("ModuleNotFoundError")
