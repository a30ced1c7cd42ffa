"""The learner: the only code that calls backward, clips and steps. It knows no method and no model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from burnish.engine.checkpoints import random_state, restore_random_state
from burnish.engine.mesh import Mesh, whole
from burnish.engine.room import Room, attempt
from burnish.optim.adamw import AdamW
from burnish.types import Batch

B = TypeVar("B", bound=Batch)
Objective = Callable[[B], tuple[Tensor, dict[str, Tensor]]]


class NonFinite(ArithmeticError):
    """The loss or the gradient of a step is not a number; the weights are still those from before it."""

    def __init__(self, step: int, quantity: str, rows: Iterable[int]) -> None:
        super().__init__(step, quantity, tuple(rows))
        self.step, self.quantity, self.rows = step, quantity, sorted(set(rows))


@dataclass
class Learner:
    """Takes optimizer steps on sums: every micro-batch's loss is a sum, divided once by a count over all of them.

    So how a step's data is cut into micro-batches, packed, or dealt to ranks cannot change its result.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    """The learning rate at a step counted from 0."""
    clip: float
    """The largest norm of the whole gradient; 0 leaves it alone."""
    mesh: Mesh
    steps_taken: int = 0
    updated: Callable[[], None] | None = None
    """Called when a step has changed the weights, where possible before the host waits for the device."""
    room: Room = field(default_factory=Room)
    """What becomes of micro-batches that memory does not suffice for."""

    def step(self, microbatches: Sequence[B], objective: Objective[B], count: Callable[[B], float]) -> dict[str, float]:
        """One optimizer step; every metric as its sum over micro-batches and ranks, divided by the count over both.

        `learning_rate` and `tokens`, how many positions the step held, are given as they are.

        `objective` gives a micro-batch's loss as a sum, and named sums besides; `count` says what it counts for. On
        several ranks each must bring a micro-batch as often as the others, an empty one if need be.
        Where memory does not suffice, the step is taken with smaller micro-batches: see `room`.
        Raises NonFinite, before any weight has changed, when the loss or the gradient norm is not finite; NoRoom,
        before that too, when a micro-batch is too much that cannot be divided.
        """
        counts = [sum(count(b) for b in microbatches), sum(len(b.tokens) for b in microbatches)]
        total, tokens = self._over_ranks(counts)
        if total == 0:
            raise ValueError("this step has no token to learn from: every weight in it is 0")
        sums = self._sums(microbatches, objective, self.mesh.world / total)  # FSDP averages gradients over ranks
        means = self.mesh.sum(torch.stack(list(sums.values()))) / total
        grad_norm = self._clip()
        results = torch.cat([means, grad_norm.double().reshape(1)])
        rate = self.learning_rate(self.steps_taken)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        unseen = self._unseen()
        if unseen is not None:  # the device goes on with the update while the host still waits for what led to it
            unseen.step(healthy=(results[0] + results[-1]).isfinite())  # loss and norm
            unseen.zero_grad()
            self._tell()
        *values, norm = results.tolist()  # the step's one wait for the device
        metrics_out = dict(zip(sums, values, strict=True)) | {"grad_norm": norm}
        self._refuse_non_finite(metrics_out, microbatches)
        if unseen is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._tell()
        self.steps_taken += 1
        if self.room.recover is not None:
            self.room.recover()
        return metrics_out | {"learning_rate": rate, "tokens": tokens}

    def _sums(self, microbatches: Sequence[B], objective: Objective[B], share: float) -> dict[str, Tensor]:
        """Gradients, times `share`, and every sum of the objective; in the end of one attempt alone, with its draws."""
        random, parts = random_state(self.mesh.device), self.room.parts(microbatches)
        while True:
            sums: dict[str, Tensor] = {}
            failed = self._accumulate(parts, objective, share, sums)
            if failed is None:
                return sums
            self.optimizer.zero_grad(set_to_none=True)
            parts = self.room.again(parts, failed)
            restore_random_state(random, self.mesh.device)

    def _accumulate(
        self, parts: Sequence[B], objective: Objective[B], share: float, sums: dict[str, Tensor]
    ) -> int | None:
        """Add all parts to the gradients and to the sums; the number of the one that memory did not suffice for."""

        def add(part: B) -> None:
            loss, metrics = objective(part)
            (loss * share).backward()
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()

        return next((number for number, part in enumerate(parts) if attempt(add, part) is None), None)

    def _tell(self) -> None:
        # Optimizers in one launch do not say so themselves, and copies of the weights (`model/factors.py`) go by it.
        torch.autograd.graph.increment_version(list(self.parameters.values()))
        if self.updated is not None:
            self.updated()

    def _over_ranks(self, counts: list[float]) -> list[float]:
        if self.mesh.world == 1:
            return counts
        return self.mesh.sum(torch.tensor(counts, dtype=torch.float64, device=self.mesh.device)).tolist()

    def _unseen(self) -> AdamW | None:
        """The optimizer, if it can be asked for a step that it leaves out where the gradient is no number."""
        optimizer = self.optimizer
        if isinstance(optimizer, AdamW) and self.mesh.world == 1 and optimizer.steps_unseen:
            return optimizer
        return None

    def _clip(self) -> Tensor:
        """The norm of the whole gradient, which is scaled down to `clip` now or in the optimizer's step."""
        if isinstance(self.optimizer, AdamW) and self.mesh.world == 1:
            return self.optimizer.clip(self.clip)
        largest = self.clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), largest, foreach=True)
        return whole(norm)

    def _refuse_non_finite(self, metrics: Mapping[str, float], microbatches: Sequence[Batch]) -> None:
        for quantity in ("loss", "grad_norm"):
            if not torch.isfinite(torch.tensor(metrics[quantity])):
                self.optimizer.zero_grad(set_to_none=True)
                raise NonFinite(self.steps_taken, quantity, [row for b in microbatches for row in b.rows])
