"""The learner: the only code that calls backward, clips and steps. It knows no method and no model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from burnish.engine.checkpoints import random_state, restore_random_state
from burnish.engine.mesh import Mesh, whole
from burnish.engine.room import Halfway, NoRoom, Room, attempt
from burnish.model.layer_gradients import Taking
from burnish.optim.adamw import AdamW
from burnish.types import Batch

B = TypeVar("B", bound=Batch)
Objective = Callable[[B], tuple[Tensor, dict[str, Tensor]]]


class NonFinite(ArithmeticError):
    """The loss or the gradient of a step is not a number; the weights are still those from before it.

    Unless some were `changed`: those whose own gradients were finite, where gradients are taken as they appear.
    """

    def __init__(self, step: int, quantity: str, rows: Iterable[int], changed: bool = False) -> None:
        super().__init__(step, quantity, tuple(rows), changed)
        self.step, self.quantity, self.rows, self.changed = step, quantity, sorted(set(rows)), changed


@dataclass
class _Way:
    """How a step goes in which gradients of matrices are taken as they appear."""

    norm: Tensor | None = None
    """Of the whole gradient, where a first pass has measured it."""
    measured: bool = False
    """Whether there was such a pass."""
    changed: bool = False
    """Whether weights may have changed."""


@dataclass
class Learner:
    """Takes optimizer steps on sums: every micro-batch's loss is a sum, divided once by a count over all of them.

    So how a step's data is cut into micro-batches, packed, or dealt to ranks cannot change its result.

    Where memory demands it, and a step is one micro-batch, gradients of matrices are taken as they appear: each weight
    is updated while the backward pass goes on, and its gradient is gone. With clipping that takes the norm of all, so
    the step is computed twice, first for the norm; and so it is where memory has not yet sufficed for a step of that
    size, since one that has changed weights cannot be taken again. The bits are those of the ordinary step in any case.
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
    taking: Taking | None = None
    """That of the model's blocks, if these can hand gradients over as they appear."""
    _proven: int = 0
    """Tokens of the largest step with gradients so taken that memory, as it is divided now, has sufficed for."""

    def step(self, microbatches: Sequence[B], objective: Objective[B], count: Callable[[B], float]) -> dict[str, float]:
        """One optimizer step; every metric as its sum over micro-batches and ranks, divided by the count over both.

        `learning_rate` and `tokens`, how many positions the step held, are given as they are.

        `objective` gives a micro-batch's loss as a sum, and named sums besides; `count` says what it counts for. On
        several ranks each must bring a micro-batch as often as the others, an empty one if need be.
        Where memory does not suffice, the step is taken with smaller micro-batches: see `room`.
        Raises NonFinite, before any weight has changed, when the loss or the gradient norm is not finite; NoRoom,
        before that too, when a micro-batch is too much that cannot be divided. Where gradients are taken as they
        appear, without clipping, only a loss that is not finite is known by then; and Halfway says that memory ran
        out too late.
        """
        counts = [sum(count(b) for b in microbatches), sum(len(b.tokens) for b in microbatches)]
        total, tokens = self._over_ranks(counts)
        if total == 0:
            raise ValueError("this step has no token to learn from: every weight in it is 0")
        rate = self.learning_rate(self.steps_taken)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = self.mesh.world / total  # FSDP averages gradients over ranks
        sums, way = self._sums(microbatches, objective, share)
        means = self.mesh.sum(torch.stack(list(sums.values()))) / total
        grad_norm = self._clip() if way.norm is None else way.norm
        results = torch.cat([means, grad_norm.double().reshape(1)])
        unseen = self._unseen()
        if unseen:  # the device goes on with the update while the host still waits for what led to it
            self._update(way, (results[0] + results[-1]).isfinite())  # loss and norm
        *values, norm = results.tolist()  # the step's one wait for the device
        metrics_out = dict(zip(sums, values, strict=True)) | {"grad_norm": norm}
        self._refuse_non_finite(metrics_out, microbatches, way.changed)
        if not unseen:
            self._update(way)
        self.steps_taken += 1
        if self.room.recover is not None and self.room.recover():
            self._proven = 0
        return metrics_out | {"learning_rate": rate, "tokens": tokens}

    def _sums(self, microbatches: Sequence[B], objective: Objective[B], share: float) -> tuple[dict[str, Tensor], _Way]:
        """Gradients, times `share`, and every sum of the objective; in the end of one attempt alone, with its draws.

        Of gradients that were taken, what they were taken for is done.
        """
        random, parts = random_state(self.mesh.device), self.room.parts(microbatches)
        while True:
            sums, way = dict[str, Tensor](), _Way()
            failed = self._accumulate(parts, objective, share, sums, way)
            if failed is None and way.measured:
                way.norm = self._clip()
                self._refuse_non_finite({"loss": float(sums["loss"]), "grad_norm": float(way.norm)}, microbatches)
                for parameter in self.parameters.values():
                    parameter.grad = None
                restore_random_state(random, self.mesh.device)
                failed = self._accumulate(parts, objective, share, {}, way)
            if failed is None:
                if way.changed:
                    self._proven = max(self._proven, len(parts[0].tokens))
                return sums, way
            if way.changed:
                raise Halfway
            self.optimizer.zero_grad(set_to_none=True)
            parts = self._again(parts, failed)
            restore_random_state(random, self.mesh.device)

    def _again(self, parts: Sequence[B], failed: int) -> list[B]:
        """What to try in place of these parts. Of two parts all gradients would be there together, which takes more."""
        self._proven = 0
        try:
            return self.room.again(parts, failed, whole=len(parts) == 1 and self._takes())
        except NoRoom as error:
            error.in_step = True
            raise

    def _accumulate(
        self, parts: Sequence[B], objective: Objective[B], share: float, sums: dict[str, Tensor], way: _Way
    ) -> int | None:
        """Add all parts to the gradients and to the sums; the number of the one that memory did not suffice for."""

        def add(part: B) -> None:
            passes = self._passes()
            loss, metrics = objective(part)
            if self._takes() and len(parts) == 1 and self._passes() == passes + 1:
                self._backward_taking(loss * share, way, known=len(part.tokens) <= self._proven)
            else:
                (loss * share).backward()
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()

        return next((number for number, part in enumerate(parts) if attempt(add, part) is None), None)

    def _backward_taking(self, loss: Tensor, way: _Way, known: bool) -> None:
        """The backward pass, with gradients that are taken: for the norm, or for the step.

        `known` is that memory suffices for it.
        """
        optimizer = self.optimizer
        assert isinstance(optimizer, AdamW)
        assert self.taking is not None
        healthy = loss.detach().isfinite()

        def measure(parameter: nn.Parameter) -> None:
            optimizer.measure_one(parameter)
            parameter.grad = None

        def update(parameter: nn.Parameter) -> None:
            way.changed = True  # before it is: an update that ends halfway may have written some of it
            if way.measured:
                optimizer.step_one(parameter)
            else:
                optimizer.take_one(parameter, healthy)

        first = (self.clip > 0 or not known) and not way.measured
        way.measured |= first
        with self.taking.by(measure if first else update):
            loss.backward()

    def _takes(self) -> bool:
        """Whether gradients are to be taken as they appear."""
        wanted = self.taking is not None and self.taking.wanted
        return wanted and isinstance(self.optimizer, AdamW) and self.mesh.world == 1

    def _passes(self) -> int:
        return 0 if self.taking is None else self.taking.passes

    def _update(self, way: _Way, healthy: Tensor | None = None) -> None:
        """The optimizer's step on the gradients that there are, which go."""
        if isinstance(self.optimizer, AdamW) and way.changed:  # pages come and go but once, from the last on
            for parameter in reversed(list(self.parameters.values())):
                if parameter.grad is not None:
                    self.optimizer.step_one(parameter, healthy)
        elif isinstance(self.optimizer, AdamW):
            self.optimizer.step(healthy=healthy)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._tell()

    def _tell(self) -> None:
        # Optimizers in one launch do not say so themselves, and copies of the weights (`model/factors.py`) go by it.
        torch.autograd.graph.increment_version(list(self.parameters.values()))
        if self.updated is not None:
            self.updated()

    def _over_ranks(self, counts: list[float]) -> list[float]:
        if self.mesh.world == 1:
            return counts
        return self.mesh.sum(torch.tensor(counts, dtype=torch.float64, device=self.mesh.device)).tolist()

    def _unseen(self) -> bool:
        """Whether the optimizer can be asked for a step that it leaves out where the gradient is no number."""
        return isinstance(self.optimizer, AdamW) and self.mesh.world == 1 and self.optimizer.steps_unseen

    def _clip(self) -> Tensor:
        """The norm of the whole gradient, which is scaled down to `clip` now or in the optimizer's step."""
        if isinstance(self.optimizer, AdamW) and self.mesh.world == 1:
            return self.optimizer.clip(self.clip)
        largest = self.clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), largest, foreach=True)
        return whole(norm)

    def _refuse_non_finite(
        self, metrics: Mapping[str, float], microbatches: Sequence[Batch], changed: bool = False
    ) -> None:
        for quantity in ("loss", "grad_norm"):
            if not torch.isfinite(torch.tensor(metrics[quantity])):
                self.optimizer.zero_grad(set_to_none=True)
                rows = [row for batch in microbatches for row in batch.rows]
                raise NonFinite(self.steps_taken, quantity, rows, changed and quantity != "loss")
