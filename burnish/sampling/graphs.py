"""CUDA graphs: a step that was run before is replayed as a whole, without the host launching each kernel."""

import functools
from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Runs a step by its key: eagerly the first time, which loads its kernels, then captured, from then on replayed.

    The key says everything that the step takes from the host: sizes, and what memory it works on. All graphs share one
    pool of memory, for none leaves anything in it: a step's results are in tensors that were there before.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Have the step done on the device, now or soon."""
        if key not in self._graphs:
            self._graphs[key] = None
            step()
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._capture(step)
        graph.replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        stream = _stream(current.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Other threads may go on using the device: those that load data, say.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a device: with each new one PyTorch would keep a workspace for matmuls."""
    return torch.cuda.Stream(device)
