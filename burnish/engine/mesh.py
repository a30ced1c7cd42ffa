"""Where a run takes place: its device, its ranks, and how a model is laid over them.

Only the engine speaks torch.distributed.
"""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

FORWARD_METHODS = ("score", "log_probs", "hidden", "values", "logits", "prefill", "decode")
"""The decoder's ways in: FSDP gathers parameters on `forward` alone unless it is told of the others."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """One process's place: its device, its rank, and how many ranks there are."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """The values added up over all ranks."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device))) if self.world > 1 else flag

    def collect(self, value: Any) -> list[Any]:
        """The small values of all ranks, in order, on every rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, gathered one at a time onto the main rank's host; nothing on others. All must call it."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            entire = whole(tensor.detach())
            if self.is_main:
                found[name] = entire.cpu()
        return found

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.world > 1:
            dist.barrier()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to the terminal."""
        return self.rank == 0


def device_kind(name: str) -> str:
    """The kind of device that a setting stands for: `auto` is cuda where there is one."""
    return name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def open_mesh(device: str) -> Generator[Mesh]:
    """The mesh of this process: a single one, or one of those that torchrun started (gloo on the CPU, NCCL on CUDA)."""
    name = device_kind(device)
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    place = torch.device("cuda", local) if name == "cuda" else torch.device("cpu")
    if name == "cuda":
        torch.cuda.set_device(place)
    if world == 1 or dist.is_initialized():  # by whoever holds one group over several runs: a second one in the same
        yield Mesh(place, rank, world)  # processes would find the addresses of the first in the store, and hang
        return
    dist.init_process_group("nccl" if name == "cuda" else "gloo")
    try:
        yield Mesh(place, rank, world)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: nn.ModuleList, mesh: Mesh) -> None:
    """Split every parameter over the ranks (FSDP2), block by block; gradients are averaged over ranks in backward."""
    if mesh.world == 1:
        return
    ranks = init_device_mesh(mesh.device.type, (mesh.world,))
    for block in blocks:
        fully_shard(block, mesh=ranks)
    for head in getattr(model, "heads", nn.ModuleDict()).values():
        fully_shard(head, mesh=ranks)  # by itself: weights in bf16 and a head in fp32 train in no common group
    fully_shard(model, mesh=ranks)
    for method in FORWARD_METHODS:
        register_fsdp_forward_method(model, method)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on this rank, gathered from all of them when it is sharded. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor laid over the ranks, on the device and in the pieces that `like` has; it keeps its own dtype."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
