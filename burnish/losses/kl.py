"""The divergence from the reference: its estimators, token by token, and the controller of what it costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Estimator = Callable[[Float[Tensor, " T"], Float[Tensor, " T"]], Float[Tensor, " T"]]

LARGEST = 20.0
"""A probability that changes by more than e^20 counts as if by that: e^89 is infinite in fp32, and 0 · ∞ is NaN."""


def k1(log_probs: Float[Tensor, " T"], reference: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """d = log π − log π_ref of a token that π drew: unbiased for KL(π‖π_ref), of either sign.

    In the token rewards it gives the gradient of the divergence. In a loss its own gradient is 0 on average.
    """
    return log_probs - reference


def k2(log_probs: Float[Tensor, " T"], reference: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """d² / 2: never negative, biased. In a loss, on tokens that π drew, its gradient is that of KL(π‖π_ref)."""
    return (log_probs - reference).square() / 2


def k3(log_probs: Float[Tensor, " T"], reference: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """e^−d − 1 + d: never negative, unbiased (Schulman, "Approximating KL divergence", 2020).

    In a loss, on tokens that π drew, its gradient is that of KL(π_ref‖π), the other direction: `policy.kl_loss` says
    how that is put right.
    """
    difference = log_probs - reference
    return torch.expm1((-difference).clamp(max=LARGEST)) + difference


@dataclass
class KLController:
    """What a nat of divergence costs, adapted to hold the divergence of an answer at `target` (Ziegler 2019, §2.2)."""

    beta: float
    target: float | None = None
    """In nats per answer: the mean over answers of the sum over their tokens. None: beta stays what it is."""
    horizon: int = 10000
    """How slowly beta adapts, in answers."""

    def update(self, kl: float, num_samples: int) -> None:
        """β ← β (1 + clip(kl / target − 1, ±0.2) · num_samples / horizon), after a step whose answers had this kl."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.beta *= 1.0 + error * num_samples / self.horizon

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"beta": self.beta}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave; a beta that nothing adapts is the one of the settings."""
        if self.target is not None:
            self.beta = float(state["beta"])


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}
