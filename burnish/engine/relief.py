"""What is given back when memory runs out, so that a step can be taken again as it is: the cheapest first."""

from dataclasses import replace
from typing import NamedTuple

import torch

from burnish.engine.memory import free_bytes
from burnish.engine.planner import MARGIN, Planner, has_host
from burnish.model.decoder import Decoder
from burnish.optim.adamw import AdamW

PATIENCE = 32
"""So many steps without a shortage, and states of the optimizer come back where there is room."""


class _Place(NamedTuple):
    """What is known of a model."""

    planner: Planner | None
    """That of its blocks; None: they are not run by hand."""
    learns: bool


class Relief:
    """Gives back, at each call, the next of: what is held to save time; activations, by a smaller plan; states.

    All learners whose memory is one share it, with all models there. Smaller plans stay. States come back to the device
    in time; where that was too soon, twice as much later.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._models: dict[Decoder, _Place] = {}
        self._optimizers: list[AdamW] = []
        """Those whose states can leave the device."""
        self._graphs_released: set[Decoder] = set()
        self._calm, self._patience = 0, PATIENCE
        """Steps since the last shortage, and how many are to pass before states come back."""
        self._planned: int | None = None
        """Bytes of states that were on the host before any were sent there from here; None: none were."""

    def add(
        self, decoder: Decoder, optimizer: torch.optim.Optimizer | None = None, planner: Planner | None = None
    ) -> None:
        """Let this model give back as well; `optimizer` is that of its learner, or of one of them."""
        if optimizer is not None or decoder not in self._models:
            self._models[decoder] = _Place(planner, optimizer is not None)
        if isinstance(optimizer, AdamW):
            self._optimizers.append(optimizer)

    def __call__(self) -> str | None:
        """What was given back, in words; None: there is nothing left."""
        self._calm = 0
        return self._recordings() or self._decoded() or self._activations() or self._states()

    def recover(self) -> bool:
        """After a step that memory sufficed for: bring states back if there is room; whether any are."""
        self._calm += 1
        if self._planned is None or self._calm < self._patience:
            return False
        self._calm, back = 0, 0
        room = min(self._away() - self._planned, self._spare())
        for optimizer in self._optimizers:
            if room > back:
                back += optimizer.restore(room - back)
        if back > 0:
            self._patience *= 2
        if self._away() <= self._planned:
            self._planned = None
        return back > 0

    def _recordings(self) -> str | None:
        released = False
        for decoder in self._models:
            fused = decoder.fused
            if fused is None or fused.graphs is None or fused.graphs.count == 0:
                continue
            fused.graphs.release()
            if decoder in self._graphs_released:  # they were made again, and there was no room for them again
                fused.graphs = None
            self._graphs_released.add(decoder)
            released = True
        return "CUDA graphs are given back" if released else None

    def _decoded(self) -> str | None:
        released = False
        for decoder, place in self._models.items():
            if place.planner is None or decoder.fused is None or not decoder.plan.dense_blocks:
                continue
            decoder.follow(replace(decoder.plan, dense_blocks=0))
            decoder.fused.release()
            released = True
        return "weights that were kept decoded are given back" if released else None

    def _activations(self) -> str | None:
        if not torch.is_grad_enabled():  # what runs now keeps none
            return None
        return next((made for made in map(self._fewer, self._models) if made is not None), None)

    def _fewer(self, decoder: Decoder) -> str | None:
        """Fewer activations of one model."""
        planner, learns = self._models[decoder]
        if planner is None:
            if decoder.checkpointing or not learns:
                return None
            decoder.checkpointing = True
            return "blocks are computed again in the backward pass from now on"
        if decoder.planner is not None:  # no pass has made a plan so far
            return None
        plan = planner.smaller()
        if plan is None:
            return None
        decoder.follow(plan)
        return "more of each block is computed again or waits on the host from now on"

    def _states(self) -> str | None:
        if not has_host(self._device):
            return None
        held, away, freed = sum(own.held() for own in self._optimizers), self._away(), 0
        for optimizer in self._optimizers:
            wanted = held // 2 + 1 - freed
            if wanted > 0 and optimizer.held() > 0:
                freed += max(0, optimizer.evict(wanted))
        if freed <= 0:
            return None
        self._planned = away if self._planned is None else self._planned
        return f"{freed / 2**20:,.0f} MiB of the optimizer's states wait on the host"

    def _away(self) -> int:
        return sum(optimizer.away() for optimizer in self._optimizers)

    def _spare(self) -> int:
        """Bytes that steps leave free."""
        planners = [place.planner for place in self._models.values() if place.planner is not None]
        if planners:
            return min(planner.spare() for planner in planners)
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        return free_bytes(self._device, MARGIN) - max(0, peak - torch.cuda.memory_allocated(self._device))
