"""Peak memory of a piece of work: CUDA's own count, or on the CPU a count of live tensor bytes."""

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """The most bytes that tensors held at once."""

    bytes: int = 0


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return, each once, until Python and autograd have let go of them."""

    def __init__(self, peak: Peak, held: list[Tensor]) -> None:
        super().__init__()
        self.peak, self.live = peak, 0
        self.seen: dict[int, Any] = {}
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):  # a wrapper without memory of its own: the rank's piece is what it holds
            tensor = cast(DTensor, tensor.detach()).to_local()
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self.seen:
            return
        self.live += size
        self.peak.bytes = max(self.peak.bytes, self.live)

        def forget(_: Any) -> None:
            self.seen.pop(key, None)
            self.live -= size

        self.seen[key] = weakref.ref(storage, forget)


@contextmanager
def measured_peak(device: torch.device, held: list[Tensor]) -> Generator[Peak]:
    """The peak of the work in the `with` block, to be read after it.

    On CUDA it is `torch.cuda.max_memory_allocated`. The CPU's allocator keeps no count, so there the bytes of live
    tensors are added up, starting with those `held` before: weights and optimizer state. This slows the block down.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
    else:
        with _LiveBytes(peak, held):
            yield peak


def in_use(device: torch.device) -> int:
    """Bytes in use now, for the progress line: CUDA's allocator, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
