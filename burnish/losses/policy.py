"""Policy gradients: the clipped losses of PPO, REINFORCE, and the divergence from the reference as a loss.

All are sums over tokens; what they are divided by, `averaging`, is half of a method.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.losses.kl import ESTIMATORS, LARGEST
from burnish.losses.likelihood import Sums
from burnish.ops.sequences import sequence_sums
from burnish.types import Batch


def ppo_loss(
    log_probs_T: Float[Tensor, " T"],
    old_T: Float[Tensor, " T"],
    advantages_T: Float[Tensor, " T"],
    weights_T: Float[Tensor, " T"],
    clip: float = 0.2,
    dual_clip: float | None = None,
) -> Sums:
    """Σ w_t max(−A_t ρ_t, −A_t clip(ρ_t, 1 − ε, 1 + ε)), ρ_t = π(y_t) / π_old(y_t).

    PPO (Schulman 2017, eq. 7). `dual_clip` c > 1 bounds it by −A_t c where A_t < 0 (Ye 2019, eq. 5). Named sums:
    `approx_kl` ½ (log ρ)²; `clip_fraction`, where clipping decides; `ratio` ρ, which is 1 at the first pass.
    """
    log_probs_T, old_T, advantages_T = scored(weights_T, log_probs_T, old_T, advantages_T)
    log_ratio_T = log_probs_T - old_T
    ratio_T = log_ratio_T.clamp(max=LARGEST).exp()
    free_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - clip, 1 + clip)
    loss_T = torch.maximum(free_T, clipped_T)
    if dual_clip is not None:
        loss_T = torch.where(advantages_T < 0, torch.minimum(loss_T, -advantages_T * dual_clip), loss_T)
    return (weights_T * loss_T).sum(), {
        "approx_kl": (weights_T * log_ratio_T.square()).sum() / 2,
        "clip_fraction": (weights_T * (clipped_T > free_T)).sum(),
        "ratio": (weights_T * ratio_T).sum(),
    }


def reinforce_loss(
    log_probs_T: Float[Tensor, " T"],
    old_T: Float[Tensor, " T"],
    advantages_T: Float[Tensor, " T"],
    weights_T: Float[Tensor, " T"],
) -> Sums:
    """−Σ w_t A_t log π(y_t), for tokens that π itself drew (Williams 1992, eq. 5).

    At the first pass its gradient is that of `ppo_loss`; at later ones nothing holds it. `ppo_loss` with `clip=inf` is
    the same with importance ratios. Named sums as there.
    """
    log_probs_T, old_T, advantages_T = scored(weights_T, log_probs_T, old_T, advantages_T)
    log_ratio_T = log_probs_T - old_T
    return -(weights_T * advantages_T * log_probs_T).sum(), {
        "approx_kl": (weights_T * log_ratio_T.square()).sum() / 2,
        "ratio": (weights_T * log_ratio_T.clamp(max=LARGEST).exp()).sum(),
    }


def value_loss(
    values_T: Float[Tensor, " T"],
    old_values_T: Float[Tensor, " T"],
    returns_T: Float[Tensor, " T"],
    weights_T: Float[Tensor, " T"],
    clip: float = 0.2,
) -> Sums:
    """½ Σ w_t max((V_t − R_t)², (V^c_t − R_t)²), V^c = clip(V, V_old − ε, V_old + ε); `clip=inf` for the plain square.

    From the code of PPO (baselines, 2017). Named sums: `value_clip_fraction`, where clipping decides, and `value_error`
    (V_t − R_t)².
    """
    values_T, old_values_T, returns_T = scored(weights_T, values_T, old_values_T, returns_T)
    near_T = values_T.clamp(old_values_T - clip, old_values_T + clip)  # within the limits V itself, to the last bit
    free_T, clipped_T = (values_T - returns_T).square(), (near_T - returns_T).square()
    return (weights_T * torch.maximum(free_T, clipped_T)).sum() / 2, {
        "value_clip_fraction": (weights_T * (clipped_T > free_T)).sum(),
        "value_error": (weights_T * free_T).sum(),
    }


def kl_loss(
    log_probs_T: Float[Tensor, " T"],
    reference_T: Float[Tensor, " T"],
    weights_T: Float[Tensor, " T"],
    estimator: str = "k3",
    old_T: Float[Tensor, " T"] | None = None,
) -> Sums:
    """Σ w_t k(log π, log π_ref); with `old_T`, of the policy that drew the tokens, Σ w_t ρ_t k, ρ = π / π_old.

    With ρ the gradient of k1 and k3 is that of KL(π‖π_ref), on and off policy: E_old[ρ k1] = Σ_y π log(π / π_ref) is
    that divergence, and E_old[ρ k3] is too, for Σ_y π (π_ref / π − 1) = 0; what is equal has equal gradients. Without
    ρ, and with π_old = π: E[∇k3] = E[(1 − π_ref / π) ∇log π] = −Σ_y π_ref ∇log π = ∇KL(π_ref‖π), the other direction;
    E[∇k1] = E[∇log π] = 0; E[∇k2] = E[log(π / π_ref) ∇log π] = ∇KL(π‖π_ref). So k1 and k3 are right with ρ
    (DeepSeek-V3.2, 2025, §3.1), k2 without it. All this holds for one token given those before it. Named sum: `kl`, k1
    of each token.
    """
    log_probs_T, reference_T = scored(weights_T, log_probs_T, reference_T)
    kl_T = ESTIMATORS[estimator](log_probs_T, reference_T)
    if old_T is not None:
        (old_T,) = scored(weights_T, old_T)
        kl_T = kl_T * (log_probs_T - old_T).clamp(max=LARGEST).exp()
    return (weights_T * kl_T).sum(), {"kl": (weights_T * (log_probs_T - reference_T)).sum()}


def averaging(batch: Batch, average: str, longest: int) -> tuple[Float[Tensor, " T"], float]:
    """The weights that a loss is given, and the count that its sum is divided by.

    `token`: each token counts the same, in whatever answer it stands (PPO; DAPO, Yu 2025, §3.3). `sequence`: each
    answer does, long or short (GRPO, Shao 2024, eq. 3). `constant`: tokens as in `token`, divided by answers ·
    `longest`, the longest answer allowed, so that no length is favoured (Dr. GRPO, Liu 2025, §3.2). An answer without
    weight is no answer.
    """
    if average == "token":
        return batch.weights, batch.total_weight
    total_S = sequence_sums(batch.weights, batch)
    count = float((total_S != 0).sum())
    if average == "constant":
        return batch.weights, count * longest
    assert average == "sequence"
    return batch.weights / total_S.where(total_S != 0, 1.0)[batch.sequence], count


def scored(weights_T: Float[Tensor, " T"], *columns_T: Float[Tensor, " T"]) -> list[Float[Tensor, " T"]]:
    """The columns, with 0 where the weight is 0: what stands there, NaN included, reaches neither loss nor gradient."""
    return [column_T.where(weights_T != 0, 0.0) for column_T in columns_T]


LOSSES: dict[str, Callable[..., Sums]] = {"ppo": ppo_loss, "reinforce": reinforce_loss, "value": value_loss}
"""Of one signature: (trained [T], what it was [T], advantages or returns [T], weights [T]) -> (sum, {name: sum})."""
