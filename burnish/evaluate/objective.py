"""What a training objective comes to on data that is not trained on: sums over batches, divided once."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from burnish.engine.room import Room
from burnish.types import Batch

B = TypeVar("B", bound=Batch)


@torch.no_grad()
def evaluate_objective(
    model: nn.Module,
    batches: Iterable[B],
    objective: Callable[[B], tuple[Tensor, dict[str, Tensor]]],
    count: Callable[[B], float],
    room: Room | None = None,
) -> dict[str, float]:
    """The loss and every named sum of the objective over all batches, divided by their count; dropout is off.

    Batches that memory does not suffice for are divided: see `room`.
    """
    training = model.training
    model.eval()
    sums: dict[str, float] = {}
    total = 0.0
    for batch, (loss, metrics) in (room or Room()).each(batches, objective):
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.double().item()
        total += count(batch)
    model.train(training)
    return {name: value / total for name, value in sums.items()}
