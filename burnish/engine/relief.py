"""What is given back when memory runs out, so that a step can be taken again as it is: the cheapest first."""

from dataclasses import replace

import torch

from burnish.engine.planner import Planner, free_bytes, has_host
from burnish.model.decoder import Decoder
from burnish.optim.adamw import AdamW

PATIENCE = 32
"""So many steps without a shortage, and states of the optimizer come back where there is room."""


class Relief:
    """Gives back, at each call, the next of: what is held to save time; activations, by a smaller plan; states.

    Smaller plans stay. States come back to the device in time; where that was too soon, twice as much later.
    """

    def __init__(
        self, decoder: Decoder, optimizer: torch.optim.Optimizer, planner: Planner | None, device: torch.device
    ) -> None:
        """`planner` is that of the decoder's blocks; None: they are not run by hand."""
        self._decoder, self._optimizer, self._planner, self._device = decoder, optimizer, planner, device
        self._graphs_released = False
        self._calm, self._patience = 0, PATIENCE
        """Steps since the last shortage, and how many are to pass before states come back."""
        self._planned: int | None = None
        """Bytes of states that were on the host before any were sent there from here; None: none were."""

    def __call__(self) -> str | None:
        """What was given back, in words; None: there is nothing left."""
        self._calm = 0
        return self._recordings() or self._decoded() or self._activations() or self._states()

    def recover(self) -> None:
        """After a step that memory sufficed for: bring states back, if it is time and there is room."""
        self._calm += 1
        if self._planned is None or self._calm < self._patience:
            return
        self._calm, self._patience = 0, 2 * self._patience
        assert isinstance(self._optimizer, AdamW)
        room = min(self._optimizer.away() - self._planned, self._spare())
        if room > 0:
            self._optimizer.restore(room)
        if self._optimizer.away() <= self._planned:
            self._planned = None

    def _recordings(self) -> str | None:
        fused = self._decoder.fused
        if fused is None or fused.graphs is None or fused.graphs.count == 0:
            return None
        fused.graphs.release()
        if self._graphs_released:  # they were made again, and there was no room for them again
            fused.graphs = None
        self._graphs_released = True
        return "CUDA graphs are given back"

    def _decoded(self) -> str | None:
        decoder = self._decoder
        if self._planner is None or decoder.fused is None or not decoder.plan.dense_blocks:
            return None
        decoder.follow(replace(decoder.plan, dense_blocks=0))
        decoder.fused.release()
        return "weights that were kept decoded are given back"

    def _activations(self) -> str | None:
        decoder = self._decoder
        if self._planner is None:
            if decoder.checkpointing:
                return None
            decoder.checkpointing = True
            return "blocks are computed again in the backward pass from now on"
        if decoder.planner is not None:  # no pass has made a plan so far
            return None
        plan = self._planner.smaller()
        if plan is None:
            return None
        decoder.follow(plan)
        return "more of each block is computed again or waits on the host from now on"

    def _states(self) -> str | None:
        if not isinstance(self._optimizer, AdamW) or not has_host(self._device):
            return None
        held, away = self._optimizer.held(), self._optimizer.away()
        freed = self._optimizer.evict(held // 2 + 1) if held else 0
        if freed <= 0:
            return None
        self._planned = away if self._planned is None else self._planned
        return f"{freed / 2**20:,.0f} MiB of the optimizer's states wait on the host"

    def _spare(self) -> int:
        """Bytes that steps leave free."""
        if self._planner is not None:
            return self._planner.spare()
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        return free_bytes(self._device) - max(0, peak - torch.cuda.memory_allocated(self._device))
