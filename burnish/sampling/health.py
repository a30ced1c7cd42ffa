"""Whether the training of a policy is healthy: numbers over all answers of a step, and what it means when one leaves
its band."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from burnish.engine.mesh import Mesh
from burnish.types import Rollout, RolloutBatch


def vital_signs(rollouts: Sequence[Rollout], batches: Sequence[RolloutBatch], mesh: Mesh) -> dict[str, float]:
    """What the step's answers say, over all ranks.

    `reward` and `reward_std` of the scores, `eos_rate`, `answer_tokens` on average, `reward_length_correlation`, all
    but `eos_rate` over the answers that have a score; `kl` of an answer: the sum over its tokens of log π - log π_ref,
    averaged over answers; `entropy` of a token: the mean of -log π over the tokens drawn; and `explained_variance`,
    1 - Var(R - V) / Var(R) over tokens, where there are values.
    """
    scored = [rollout for rollout in rollouts if rollout.score is not None]
    pairs = [(float(len(r.answer_ids)), float(r.score or 0.0)) for r in scored]
    sums = [
        *(float(len(rollouts)), float(len(scored))),
        float(sum(rollout.ended for rollout in rollouts)),
        *(sum(x for x, _ in pairs), sum(y for _, y in pairs)),
        *(sum(x * x for x, _ in pairs), sum(y * y for _, y in pairs), sum(x * y for x, y in pairs)),
    ]
    tokens = torch.zeros(7, dtype=torch.float64, device=mesh.device)
    has_values = False
    for b in batches:
        counted = b.weights != 0
        gap = (b.old_log_probs - b.reference_log_probs).where(counted, 0.0)
        error, returns = (b.returns - b.old_values)[counted].double(), b.returns[counted].double()
        has_values = has_values or bool(b.old_values[counted].any())
        parts = (counted.double(), gap.double(), -b.old_log_probs.where(counted, 0.0).double())
        tokens += torch.stack([p.sum() for p in (*parts, error, error**2, returns, returns**2)])
    known = torch.tensor(sums, dtype=torch.float64, device=mesh.device)
    n, m, ended, x, y, xx, yy, xy, t, gap_sum, surprise, e, ee, r, rr = mesh.sum(torch.cat([known, tokens])).tolist()
    x_var, y_var = (max(0.0, square / max(m, 1) - (total / max(m, 1)) ** 2) for square, total in ((xx, x), (yy, y)))
    spread = (x_var * y_var) ** 0.5
    signs = {
        "reward": y / max(m, 1),
        "reward_std": y_var**0.5,
        "kl": gap_sum / max(m, 1),
        "entropy": surprise / max(t, 1),
        "eos_rate": ended / max(n, 1),
        "answer_tokens": x / max(m, 1),
        "reward_length_correlation": (xy / max(m, 1) - x * y / max(m, 1) ** 2) / spread if spread > 1e-12 else 0.0,
    }
    returns_var = rr / max(t, 1) - (r / max(t, 1)) ** 2
    if has_values and returns_var > 1e-12:
        signs["explained_variance"] = 1 - (ee / max(t, 1) - (e / max(t, 1)) ** 2) / returns_var
    return signs


@dataclass(frozen=True, slots=True)
class Band:
    """Where a number of a healthy run lies, and what its leaving most likely means."""

    lowest: float
    highest: float
    below: str = ""
    above: str = ""


BANDS = {
    "kl": Band(
        -0.5,
        30.0,
        "answers are not drawn from the distribution that is scored: the reference or the temperature differs",
        "the policy has left the reference: raise kl.beta, set kl.target, or lower optim.lr",
    ),
    "clip_fraction": Band(0.0, 0.35, "", "updates are too large: lower optim.lr, or write fewer epochs"),
    "eos_rate": Band(
        0.5, 1.0, "answers run into rollout.max_tokens: raise it, or write reward.missing_eos=replace or subtract"
    ),
    "entropy": Band(
        0.01, float("inf"), "the policy always answers the same: raise kl.beta or rollout.temperature, lower optim.lr"
    ),
    "explained_variance": Band(
        -0.5, 1.0, "the value model predicts worse than the mean does: raise value.lr, or value.warmup"
    ),
    "reward_length_correlation": Band(
        -0.85, 0.85, "", "the reward pays for length: look at the answers, and at the reward model's length correlation"
    ),
    "reward_std": Band(1e-6, float("inf"), "all answers earn the same, so there is nothing to learn from"),
    "failed": Band(0.0, 0.0, "", "answers without a score were left out: see what the reward source said"),
}
"""The bands of the health line."""

SETTLED = 5
"""Steps after which a number is held against its band: at the start a value model, say, knows nothing."""


class Health:
    """Says once for each number that it has left its band, and what the cause is likely to be."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def warnings(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """What is new to be said about a step's metrics."""
        found: list[str] = []
        for name, band in BANDS.items():
            value = metrics.get(name)
            if value is None or name in self._told or (step < SETTLED and name != "failed"):
                continue
            cause = band.below if value < band.lowest else band.above if value > band.highest else ""
            if cause:
                self._told.add(name)
                found.append(f"step {step + 1}: {name} is {value:.3g}: {cause}")
        return found


def line(metrics: Mapping[str, float]) -> str:
    """The health line of a step, for a terminal."""
    shown = {
        "reward": "reward {:+.3f}",
        "kl": "KL {:.2f}",
        "clip_fraction": "clipped {:.1%}",
        "eos_rate": "ended {:.0%}",
        "explained_variance": "explained {:.0%}",
        "entropy": "entropy {:.2f}",
        "answer_tokens": "{:.0f} tokens",
    }
    return ", ".join(text.format(metrics[name]) for name, text in shown.items() if name in metrics)
