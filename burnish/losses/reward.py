"""Reward modelling: answers that people prefer get the higher score."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from burnish.losses.likelihood import Sums
from burnish.types import PreferenceBatch


def ranking_loss(scores_S: Float[Tensor, " S"], batch: PreferenceBatch, centering: float = 0.0) -> Sums:
    """Σ w_p (−log σ(r_c − r_r − margin) + centering · (r_c + r_r)²), to be divided by `batch.num_pairs`.

    The C(K, 2) pairs of K ranked answers weigh 1 together (InstructGPT, Ouyang 2022, eq. 1). The margin is Llama 2's
    (Touvron 2023, eq. 2). `centering` holds scores around 0, which pairs alone leave free (Eisenstein 2023). Named
    sums: `accuracy` (a tie counts half); `margin`, r_c − r_r; `log_loss`, the loss without margins, which measures
    calibration; `chosen_score`, `rejected_score`.
    """
    weights_P = batch.pair_weights
    counted = weights_P != 0
    chosen_P = scores_S[batch.chosen].where(counted, 0.0)
    rejected_P = scores_S[batch.rejected].where(counted, 0.0)
    difference_P = chosen_P - rejected_P
    loss_P = -F.logsigmoid(difference_P - batch.margins.where(counted, 0.0))
    if centering:
        loss_P = loss_P + centering * (chosen_P + rejected_P).square()
    metrics = {
        "accuracy": wins(difference_P),
        "margin": difference_P,
        "log_loss": -F.logsigmoid(difference_P),
        "chosen_score": chosen_P,
        "rejected_score": rejected_P,
    }
    return (weights_P * loss_P).sum(), {name: (weights_P * value).sum() for name, value in metrics.items()}


def wins(difference_P: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """1 where the better answer is ahead, ½ where they tie, else 0."""
    return torch.heaviside(difference_P.detach(), torch.full_like(difference_P, 0.5))


LOSSES: dict[str, Callable[..., Sums]] = {"ranking": ranking_loss}
