"""Advantages: how much better than expected each token was, or each answer.

A *step* is a position whose target the policy wrote: one whose weight is not 0. Positions between the steps of a
sequence, such as another's turns, are passed over: the step after such a turn follows the last one before it.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from burnish.losses.kl import ESTIMATORS
from burnish.ops.sequences import sequence_sums
from burnish.types import Batch


def steps_of(batch: Batch, ended_S: Bool[Tensor, " S"] | None = None) -> Bool[Tensor, " T"]:
    """Which positions are steps.

    With `ended_S`, one more in each sequence that ended by itself: its last position, which reads the end token and
    writes nothing. There the score then falls, one slot after the end (variant P1 of "The N+ implementation details of
    RLHF with PPO", Huang 2024), and its value is learned; its policy weight stays 0. An answer cut at the length limit
    has no such slot.
    """
    steps_T = batch.weights != 0
    if ended_S is None:
        return steps_T
    written_S = sequence_sums(steps_T.float(), batch) > 0
    return steps_T.index_put((batch.starts[1:].long() - 1,), ended_S & written_S)


def token_rewards(
    log_probs_T: Float[Tensor, " T"],
    reference_T: Float[Tensor, " T"],
    scores_S: Float[Tensor, " S"],
    batch: Batch,
    beta: float,
    estimator: str = "k1",
    steps_T: Bool[Tensor, " T"] | None = None,
) -> Float[Tensor, " T"]:
    """r_t = −β k(log π_old(y_t), log π_ref(y_t)), and the score of a sequence added at its last step; 0 elsewhere.

    Ziegler 2019, eq. 2. `steps_T`: those of `steps_of`; none: the positions of weight. A sequence without steps gets
    nothing, whatever its score.
    """
    written_T = batch.weights != 0
    kl_T = ESTIMATORS[estimator](log_probs_T, reference_T)
    rewards_T = torch.where(written_T, -beta * kl_T, 0.0)
    layout = _Layout(written_T if steps_T is None else steps_T, batch)
    return rewards_T.index_add(0, layout.last, scores_S[layout.with_steps].to(rewards_T.dtype))


def gae(
    rewards_T: Float[Tensor, " T"],
    values_T: Float[Tensor, " T"],
    batch: Batch,
    gamma: float = 1.0,
    lam: float = 0.95,
    steps_T: Bool[Tensor, " T"] | None = None,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """Advantages and returns at the steps, 0 elsewhere.

    δ_t = r_t + γ V_t+1 − V_t, A_t = δ_t + γλ A_t+1, R_t = A_t + V_t (Schulman 2016, eqs. 11 to 16). t + 1 is the next
    step of the sequence; after its last one V and A are 0, for an answer that was cut as for one that ended. The
    returns are made of these advantages, before any whitening.
    """
    layout = _Layout(batch.weights != 0 if steps_T is None else steps_T, batch)
    values_LS = layout.rows(values_T)
    following_LS = torch.cat([values_LS[1:], torch.zeros_like(values_LS[:1])])
    advantages_LS = layout.rows(rewards_T) + gamma * following_LS - values_LS
    for t in reversed(range(len(advantages_LS) - 1)):
        advantages_LS[t].add_(advantages_LS[t + 1], alpha=gamma * lam)
    return layout.flat(advantages_LS), layout.flat(advantages_LS + values_LS)


def returns_to_go(rewards_T: Float[Tensor, " T"], batch: Batch, gamma: float = 1.0) -> Float[Tensor, " T"]:
    """Σ_{l ≥ t} γ^(l − t) r_l at the steps: the advantage of REINFORCE++ before whitening (Hu 2025, §3)."""
    return gae(rewards_T, torch.zeros_like(rewards_T), batch, gamma, lam=1.0)[0]


def leave_one_out(
    scores_S: Float[Tensor, " S"], groups_S: Int[Tensor, " S"], valid_S: Bool[Tensor, " S"] | None = None
) -> Float[Tensor, " S"]:
    """A_i = s_i − the mean of the group's other scores (RLOO: Kool 2019; Ahmadian 2024, eq. 6).

    0 for scores that are not valid (none given: those that are NaN), which no other's mean counts, and for a score that
    has no other beside it.
    """
    groups = _Groups(scores_S, groups_S, valid_S)
    others_S = (groups.count - 1).clamp(min=1)
    return torch.where(groups.compared, groups.centred * groups.count / others_S, 0.0)


def group_relative(
    scores_S: Float[Tensor, " S"],
    groups_S: Int[Tensor, " S"],
    valid_S: Bool[Tensor, " S"] | None = None,
    scale: bool = True,
) -> Float[Tensor, " S"]:
    """A_i = (s_i − mean) / (std + 10⁻⁴), mean and unbiased std of the group's scores (GRPO: Shao 2024, §4.1.2).

    `scale=False` leaves the std out (Dr. GRPO: Liu 2025, §3.2). 0 where `leave_one_out` is, and where all scores tie.
    """
    groups = _Groups(scores_S, groups_S, valid_S)
    advantages_S = groups.centred
    if scale:
        variance_S = groups.sums(groups.centred.square()) / (groups.count - 1).clamp(min=1)
        advantages_S = advantages_S / (variance_S.sqrt() + 1e-4)
    return torch.where(groups.compared, advantages_S, 0.0)


def on_tokens(advantages_S: Float[Tensor, " S"], batch: Batch) -> Float[Tensor, " T"]:
    """Each sequence's advantage at each of its positions of weight, 0 elsewhere."""
    return torch.where(batch.weights != 0, advantages_S[batch.sequence], 0.0)


def moments(values_T: Float[Tensor, " T"], weights_T: Float[Tensor, " T"]) -> Float[Tensor, "3"]:
    """(Σ w, Σ w x, Σ w x²) in float64: added up over batches and ranks, they are what `whiten` needs."""
    x_T = values_T.where(weights_T != 0, 0.0).double()
    w_T = weights_T.double()
    return torch.stack([w_T.sum(), (w_T * x_T).sum(), (w_T * x_T.square()).sum()])


def whiten(
    values_T: Float[Tensor, " T"],
    weights_T: Float[Tensor, " T"],
    moments: Float[Tensor, "3"],
    shift_mean: bool = True,
    unbiased: bool = False,
) -> Float[Tensor, " T"]:
    """(x − μ) / √(σ² + 10⁻⁸), 0 where the weight is 0; μ and σ² of everything that `moments` was made of.

    `shift_mean=False` gives the mean back, for rewards. The variance is the sum of squares over the count (OpenAI 2019,
    N+), or with `unbiased` over one less (TRL, verl). One value alone, or none, stays finite.
    """
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1e-12)
    variance = (squares / count.clamp(min=1e-12) - mean.square()).clamp(min=0.0)
    if unbiased:
        variance = variance * count / (count - 1).clamp(min=1.0)
    x_T = (values_T.where(weights_T != 0, 0.0).double() - mean) / (variance + 1e-8).sqrt()
    return torch.where(weights_T != 0, x_T if shift_mean else x_T + mean, 0.0).to(values_T.dtype)


class _Layout:
    """The steps of each sequence as a column [L, S]: the first at the top, zeros below the last."""

    def __init__(self, steps_T: Bool[Tensor, " T"], batch: Batch) -> None:
        self.places = steps_T.nonzero()[:, 0]
        self.sequence = batch.sequence[self.places]
        count_S = torch.bincount(self.sequence, minlength=batch.num_sequences)
        first_S = count_S.cumsum(0) - count_S
        self.row = torch.arange(len(self.places), device=steps_T.device) - first_S[self.sequence]
        self.shape = (int(count_S.max()) if len(count_S) else 0, batch.num_sequences)
        self.size = len(steps_T)
        self.with_steps = count_S.nonzero()[:, 0]
        self.last = self.places[(first_S + count_S - 1)[self.with_steps]]

    def rows(self, values_T: Float[Tensor, " T"]) -> Float[Tensor, "L S"]:
        """Values at the steps."""
        rows_LS = torch.zeros(self.shape, dtype=values_T.dtype, device=values_T.device)
        return rows_LS.index_put((self.row, self.sequence), values_T[self.places])

    def flat(self, rows_LS: Float[Tensor, "L S"]) -> Float[Tensor, " T"]:
        """The values back at their positions, 0 at the others."""
        flat_T = torch.zeros(self.size, dtype=rows_LS.dtype, device=rows_LS.device)
        return flat_T.index_put((self.places,), rows_LS[self.row, self.sequence])


class _Groups:
    """Scores against the mean of their group, the invalid left out."""

    def __init__(
        self, scores_S: Float[Tensor, " S"], groups_S: Int[Tensor, " S"], valid_S: Bool[Tensor, " S"] | None
    ) -> None:
        valid_S = ~scores_S.isnan() if valid_S is None else valid_S
        self.member = groups_S.unique(return_inverse=True)[1]
        self.count = self.sums(valid_S.to(scores_S.dtype))
        self.compared = valid_S & (self.count > 1)
        scores_S = scores_S.where(valid_S, 0.0)
        mean_S = self.sums(scores_S) / self.count.clamp(min=1)
        self.centred = torch.where(valid_S, scores_S - mean_S, 0.0)

    def sums(self, values_S: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """The sum over its group, for each member."""
        return torch.zeros_like(values_S).index_add(0, self.member, values_S)[self.member]
