"""What recordings of passes are made with and of: CUDA graphs, memory that they share, gradients in one tensor."""

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Recorder:
    """Makes CUDA graphs of steps, on a stream of its own: for each new stream PyTorch would keep a matmul workspace."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def new_pool(self) -> Any:
        """Memory for recordings that are never at work at the same time."""
        return torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Generator[None]:
        """Work on the other stream, after all work so far and before all that follows."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, step: Callable[[], None], pool: Any) -> Callable[[], None]:
        """What repeats all that the step launches. All its kernels must have been loaded before."""
        graph = torch.cuda.CUDAGraph()
        with self.aside():
            # Other threads may go on using the device: those that load data, say.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        return graph.replay

    def allocated(self) -> int:
        """Bytes of tensors on the device."""
        return torch.cuda.memory_allocated(self._device)

    def reserved(self) -> int:
        """Bytes that the allocator holds."""
        return torch.cuda.memory_reserved(self._device)

    def free(self) -> int:
        """Bytes that a recording can get: it cannot make the allocator give back what is cached, so this does."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]


class Lane:
    """The memory of recordings of which at most one is between its halves."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.size = 0
        """Bytes of the pool."""
        self._flight: weakref.ref[Flight] | None = None

    @property
    def busy(self) -> bool:
        """Whether a pass that is between its halves may still go on."""
        flight = None if self._flight is None else self._flight()
        return flight is not None and not flight.landed

    def take(self) -> "Flight":
        """Taken until the flight has landed or nobody holds it any more."""
        flight = Flight()
        self._flight = weakref.ref(flight)
        return flight


class Flight:
    """A pass between its halves."""

    landed = False


class Gradients:
    """The gradients of an adapter in one tensor, which one launch copies."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.shapes = [parameter.shape for parameter in parameters]
        self.sizes = [parameter.numel() for parameter in parameters]
        self.ids = [id(parameter) for parameter in parameters]
        first = parameters[0]
        self.flat = torch.zeros(sum(self.sizes), dtype=first.dtype, device=first.device)
        self.parts = self._split(self.flat)

    def copy(self) -> list[Tensor]:
        """As they are now: the next replay does not touch them."""
        return self._split(self.flat.clone())

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]
