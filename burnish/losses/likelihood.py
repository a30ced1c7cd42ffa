"""Maximum likelihood: the cross-entropy of weighted tokens."""

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor

Sums = tuple[Tensor, dict[str, Tensor]]


def cross_entropy(log_probs: Float[Tensor, " T"], weights: Float[Tensor, " T"], correct: Bool[Tensor, " T"]) -> Sums:
    """−Σ w_t log P(y_t | x, y_<t), and the same sum of hits, to be divided by Σ w_t.

    A position of weight 0 contributes exactly nothing, whatever its log-prob is (NaN and infinity included).
    """
    scored = weights != 0
    loss = -(weights * log_probs.where(scored, 0.0)).sum()
    return loss, {"mean_token_accuracy": (weights * (correct & scored)).sum()}


LOSSES: dict[str, Callable[..., Sums]] = {"cross_entropy": cross_entropy}
