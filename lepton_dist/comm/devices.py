"""The GPUs that this process sees, and what carries GPU tensors between the members of a group.

CUDA itself heeds CUDA_VISIBLE_DEVICES and SLURM's binding: what it shows is what this process may use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lepton_dist.comm.gpu_wait import GpuWait
from lepton_dist.comm.group import Group
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.transport import PointToPoint
from lepton_dist.comm.transports.aware import AwareMessages
from lepton_dist.comm.transports.courier import Courier
from lepton_dist.comm.transports.staged import StagedMessages, StagedTransport
from lepton_dist.plan.devices import Binding, GpuId, Sight, can_use_nccl

MOST_GPUS = 32
"""GPUs that one rank can tell of; a node with more shows each rank fewer (CUDA_VISIBLE_DEVICES)."""
SIGHT_WORDS = 2 + 2 * MOST_GPUS


def has_gpus() -> bool:
    """Whether torch is a CUDA build and finds a GPU that this process may use."""
    return torch.cuda.is_available() and torch.cuda.device_count() > 0


def see_gpus() -> Sight:
    """What this process sees; imports CuPy only where there is a GPU."""
    if not has_gpus():
        return Sight()
    numbers = range(min(torch.cuda.device_count(), MOST_GPUS))
    return Sight(tuple(gpu_id(str(torch.cuda.get_device_properties(n).uuid)) for n in numbers), not nccl_problem())


def nccl_problem() -> str:
    """Why NCCL cannot be used through CuPy, in words; empty when it can. Needs no GPU."""
    try:
        from cupy.cuda import nccl

        nccl.get_version()
    except (ImportError, AttributeError, RuntimeError) as error:
        # Without nvidia-nccl, cupy.cuda.nccl is a stub that has no functions.
        return f"{type(error).__name__}: {error}"
    return ""


def gpu_id(uuid: str) -> GpuId:
    """A UUID such as ``GPU-1b2c...`` or plain hexadecimal as two signed words.

    Raises:
        ValueError: it has not 32 hexadecimal digits.
    """
    digits = uuid.split("/")[0].removeprefix("MIG-").removeprefix("GPU-").replace("-", "")
    if len(digits) != 32:
        raise ValueError(f"{uuid!r} is no UUID of a GPU: 32 hexadecimal digits are wanted, these are {len(digits)}")
    data = bytes.fromhex(digits)
    return int.from_bytes(data[:8], "big", signed=True), int.from_bytes(data[8:], "big", signed=True)


def pack_sight(sight: Sight) -> list[int]:
    """A sight as `SIGHT_WORDS` whole numbers, for ranks to exchange."""
    words = [len(sight.gpus), int(sight.has_nccl), *(word for gpu in sight.gpus for word in gpu)]
    return words + [0] * (SIGHT_WORDS - len(words))


def unpack_sight(words: Sequence[int]) -> Sight:
    """The sight in some words."""
    ids = tuple((words[2 + 2 * n], words[3 + 2 * n]) for n in range(words[0]))
    return Sight(ids, bool(words[1]))


@dataclass(frozen=True)
class Devices:
    """Where this rank and the others compute, and what moves their GPU tensors on."""

    bindings: Sequence[Binding]
    sights: Sequence[Sight]
    device: torch.device
    courier: Courier
    wait: GpuWait
    patience: Patience

    @staticmethod
    def of(rank: int, bindings: Sequence[Binding], sights: Sequence[Sight], patience: Patience) -> Devices:
        """Take the GPU that world rank `rank` is bound to as this process's current one, if it is bound to one."""
        number = bindings[rank].gpu
        device = torch.device("cpu") if number is None else torch.device("cuda", number)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # Sums of matmuls stay in float32 until their end, as on CPUs.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        courier = Courier()
        wait = GpuWait(patience, f"the GPU of rank {rank}", courier.progress)
        return Devices(bindings, sights, device, courier, wait, patience)

    def serve(self, group: Group, *, is_one_way: bool = False) -> Group:
        """Let `group` carry this rank's GPU tensors; returns it. Collective over the group where all have GPUs.

        NCCL carries them where every member has a GPU of its own, and pinned host memory where not. Messages go over
        NCCL only in a group of two that sends one way, `is_one_way`; else over MPI, which takes them from the GPU's
        memory if it can.

        Raises:
            RankLostError: a member did not come before the deadline.
        """
        if group.size == 1 or self.device.type == "cpu":
            return group
        members = [self.bindings[rank] for rank in group.members]
        messages = self._messages(group)
        if not (can_use_nccl(members) and all(self.sights[rank].has_nccl for rank in group.members)):
            group.serve_gpu(StagedTransport(group, self.patience), messages)
            return group
        # Without a GPU nothing of CUDA is imported.
        from lepton_dist.comm.transports.nccl import NcclMessages, NcclTransport, join

        link = join(group, self.device, self.patience)
        self.wait.watch([link])
        group.serve_gpu(NcclTransport(link), NcclMessages(link) if is_one_way else messages)
        return group

    def _messages(self, group: Group) -> PointToPoint:
        if group.gpu_messages is None:
            return StagedMessages(group, self.courier, self.patience)
        return AwareMessages(group.gpu_messages, group.name, self.courier, self.patience)
