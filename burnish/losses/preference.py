"""Learning from preferences without a reward model: DPO and its relatives.

What they share, of a pair of answers c (chosen) and r (rejected) to one prompt x:

    π_c, π_r    log π(y_c | x) and log π(y_r | x), sums over the tokens of the answer; ref_c, ref_r of the reference
    n_c, n_r    tokens of the answers
    h_c, h_r    log-ratios: h_c = π_c − ref_c, h_r = π_r − ref_r
    Δ           h_c − h_r
    β, ε, m     `Options.beta`, `.label_smoothing`, `.margin`
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from burnish.losses.likelihood import Sums
from burnish.losses.reward import wins
from burnish.ops.sequences import sequence_sums
from burnish.types import Batch, PreferenceBatch


class Pairs(NamedTuple):
    """The log-probs of pairs of answers, summed over their tokens."""

    chosen: Float[Tensor, " P"]
    rejected: Float[Tensor, " P"]
    chosen_reference: Float[Tensor, " P"]
    """0 where no reference is asked."""
    rejected_reference: Float[Tensor, " P"]
    chosen_length: Float[Tensor, " P"]
    """The sum of the weights of its tokens: how many there are, where each weighs 1."""
    rejected_length: Float[Tensor, " P"]

    @property
    def chosen_ratio(self) -> Float[Tensor, " P"]:
        """h_c = log π(y_c | x) − log π_ref(y_c | x)."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Float[Tensor, " P"]:
        """h_r = log π(y_r | x) − log π_ref(y_r | x)."""
        return self.rejected - self.rejected_reference

    @property
    def delta(self) -> Float[Tensor, " P"]:
        """Δ = h_c − h_r."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_delta(self) -> Float[Tensor, " P"]:
        """h_c / n_c − h_r / n_r."""
        return self.chosen_ratio / self.chosen_length - self.rejected_ratio / self.rejected_length


@dataclass(frozen=True, slots=True)
class Options:
    """The constants of the losses; each reads those that its formula names."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    """ε: how many of the labels are taken to be wrong."""
    margin: float = 1.0
    """m: by how much SimPO and SLiC want the chosen answer ahead."""
    wanted_weight: float = 1.0
    """KTO: what a wanted answer weighs."""
    unwanted_weight: float = 1.0


PairLoss = Callable[[Pairs, Options], Tensor]


def answer_sums(log_probs_T: Float[Tensor, " T"], batch: Batch) -> Float[Tensor, " S"]:
    """Σ w_t log P(y_t) of each sequence. Positions of weight 0 contribute exactly nothing, whatever stands there."""
    return sequence_sums(log_probs_T.where(batch.weights != 0, 0.0) * batch.weights, batch)


def pairs_of(
    log_probs_T: Float[Tensor, " T"], reference_T: Float[Tensor, " T"] | None, batch: PreferenceBatch
) -> Pairs:
    """The pairs of a batch, from the policy's log-probs and the reference's, if it is asked."""
    policy_S = answer_sums(log_probs_T, batch)
    reference_S = torch.zeros_like(policy_S) if reference_T is None else answer_sums(reference_T, batch)
    length_S = sequence_sums(batch.weights, batch)
    sums = (policy_S, reference_S, length_S)
    (chosen, chosen_reference, chosen_length), (rejected, rejected_reference, rejected_length) = (
        [sum_S[side] for sum_S in sums] for side in (batch.chosen, batch.rejected)
    )
    return Pairs(chosen, rejected, chosen_reference, rejected_reference, chosen_length, rejected_length)


def preference_loss(pairs: Pairs, weights_P: Float[Tensor, " P"], mix: Mapping[str, float], options: Options) -> Sums:
    """Σ_p w_p Σ_i mix_i L_i, to be divided by `batch.num_pairs`.

    Named sums: of each loss where several are mixed; `chosen_reward` β h_c and `rejected_reward` β h_r, per token where
    the losses are; their difference, `margin`; `accuracy`, how often it is above 0 (a tie counts half).
    """
    counted = weights_P != 0
    pairs = Pairs(*(column.where(counted, 0.0) for column in pairs[:4]), *(n.where(n > 0, 1.0) for n in pairs[4:]))
    losses = {name: (weights_P * LOSSES[name](pairs, options)).sum() for name in mix}
    loss = torch.stack([mix[name] * value for name, value in losses.items()]).sum()

    per_token = mix.keys() - {"sft"} <= PER_TOKEN
    chosen_P = options.beta * pairs.chosen_ratio / (pairs.chosen_length if per_token else 1)
    rejected_P = options.beta * pairs.rejected_ratio / (pairs.rejected_length if per_token else 1)
    metrics = {
        "chosen_reward": chosen_P,
        "rejected_reward": rejected_P,
        "margin": chosen_P - rejected_P,
        "accuracy": wins(chosen_P - rejected_P),
    }
    named = {f"{name}_loss": value for name, value in losses.items()} if len(mix) > 1 else {}
    return loss, named | {name: (weights_P * value).sum() for name, value in metrics.items()}


def sigmoid(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """−(1 − ε) log σ(βΔ) − ε log σ(−βΔ).

    DPO (Rafailov 2023, eq. 7); with ε > 0 conservative DPO (Mitchell 2023), which stops at σ(βΔ) = 1 − ε.
    """
    return _logistic(options.beta * pairs.delta, options.label_smoothing)


def robust(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """[−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε).

    Robust DPO (Ray Chowdhury 2024): where a share ε < ½ of the labels is flipped, its mean is the loss on true labels.
    """
    smoothing = options.label_smoothing
    if smoothing >= 0.5:
        raise ValueError(f"label_smoothing is {smoothing:g}: the loss robust needs less than 0.5, for example 0.1")
    x = options.beta * pairs.delta
    return (smoothing * F.logsigmoid(-x) - (1 - smoothing) * F.logsigmoid(x)) / (1 - 2 * smoothing)


def ipo(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """(h_c / n_c − h_r / n_r − 1 / 2β)².

    IPO (Azar 2023, eq. 17), on means over tokens: so the paper's authors say their results were made.
    """
    return (pairs.mean_delta - 1 / (2 * options.beta)).square()


def hinge(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """max(0, 1 − βΔ): SLiC's hinge on DPO's log-ratios (RSO, Liu 2023)."""
    return F.relu(1 - options.beta * pairs.delta)


def slic(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """max(0, m − π_c + π_r): calibration of the policy's own log-probs, without a reference.

    SLiC-HF (Zhao 2023, eq. 4, its first term). Its second, a likelihood that holds the policy, is `sft`: mix them.
    """
    return F.relu(options.margin - pairs.chosen + pairs.rejected)


def exo(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """KL(q‖p) with q = σ(βΔ), p = 1 − ε: q (log q − log(1 − ε)) + (1 − q) (log(1 − q) − log ε).

    EXO for pairs (Ji 2024, eq. 16). With ε = 0 it is infinite.
    """
    smoothing = options.label_smoothing
    if not 0 < smoothing < 1:
        raise ValueError(
            f"label_smoothing is {smoothing:g}: the loss exo needs it between 0 and 1; the paper has 0.001"
        )
    x = options.beta * pairs.delta
    better = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-smoothing))
    return better + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(smoothing))


def apo_zero(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """1 − σ(β h_c) + σ(β h_r), for chosen answers better than the policy's (APO-zero, D'Oosterlinck 2024, eq. 7)."""
    return torch.sigmoid(-options.beta * pairs.chosen_ratio) + torch.sigmoid(options.beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """σ(β h_c) + 1 − σ(βΔ), for chosen answers worse than the policy's (APO-down, D'Oosterlinck 2024, eq. 8)."""
    return torch.sigmoid(options.beta * pairs.chosen_ratio) + torch.sigmoid(-options.beta * pairs.delta)


def sppo(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """(h_c − 1 / 2β)² + (h_r + 1 / 2β)²: SPPO (Wu 2024, eq. 4.7) with the winner's probability 1 and the loser's 0."""
    target = 1 / (2 * options.beta)
    return (pairs.chosen_ratio - target).square() + (pairs.rejected_ratio + target).square()


def sigmoid_norm(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """−(1 − ε) log σ(βδ) − ε log σ(−βδ), δ = h_c / n_c − h_r / n_r: DPO per token (Tülu 3, Lambert 2024, §5)."""
    return _logistic(options.beta * pairs.mean_delta, options.label_smoothing)


def simpo(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """−(1 − ε) log σ(z) − ε log σ(−z), z = β π_c / n_c − β π_r / n_r − m: SimPO (Meng 2024, eq. 6), no reference.

    The paper has β from 2 to 10 and m, its γ, from 0.3 to 1.6.
    """
    difference = pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length
    return _logistic(options.beta * difference - options.margin, options.label_smoothing)


def orpo(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """−π_c / n_c − β log σ(log odds_c − log odds_r), odds = p / (1 − p), p = exp(π / n): no reference.

    ORPO (Hong 2024, eqs. 4, 6 and 7; their λ is β). The likelihood is that of the answer alone.
    """
    chosen, rejected = pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return sft(pairs, options) - options.beta * F.logsigmoid(log_odds)


def cpo(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """−(1 − ε) log σ(z) − ε log σ(−z) − π_c / n_c, z = β (π_c − π_r): no reference (CPO, Xu 2024, eqs. 3 to 5)."""
    preferred = _logistic(options.beta * (pairs.chosen - pairs.rejected), options.label_smoothing)
    return preferred + sft(pairs, options)


def sft(pairs: Pairs, options: Options) -> Float[Tensor, " P"]:
    """−π_c / n_c: the negative log-likelihood of the chosen answer, per token."""
    return -pairs.chosen / pairs.chosen_length


def kto_divergence(log_ratio_S: Float[Tensor, " S"], labels_S: Int[Tensor, " S"]) -> Float[Tensor, "2"]:
    """(Σ h, how many) over the answers to other prompts, those of label 0.

    Added up over micro-batches and ranks, the first over the second is what `kto_loss` takes for KL(π‖π_ref).
    """
    mismatched = labels_S == 0
    return torch.stack([log_ratio_S.detach().where(mismatched, 0.0).sum(), mismatched.sum().to(log_ratio_S.dtype)])


def kto_loss(
    log_ratio_S: Float[Tensor, " S"], labels_S: Int[Tensor, " S"], kl: Float[Tensor, ""] | float, options: Options
) -> Sums:
    """Σ_s λ_s (1 − σ(± β (h_s − z))), z = max(0, kl), + for wanted answers: to be divided by `batch.num_labels`.

    KTO (Ethayarajh 2024, eq. 7). h_s = log π(y) − log π_ref(y), the difference of two `answer_sums`; label 1 wanted, −1
    unwanted, 0 left out. No gradient flows through z. Named sums: `accuracy`, on the right side of z (a tie counts
    half); `wanted`, how many are; `wanted_reward` and `unwanted_reward`, β h over each kind; `kl`, z for each answer.
    """
    labelled, wanted = labels_S != 0, labels_S > 0
    zero_point = torch.as_tensor(kl, dtype=log_ratio_S.dtype, device=log_ratio_S.device).detach().clamp(min=0.0)
    ratio_S = log_ratio_S.where(labelled, 0.0)
    sign_S = labels_S.to(ratio_S.dtype)
    weights_S = options.wanted_weight * sign_S.clamp(min=0) - options.unwanted_weight * sign_S.clamp(max=0)
    ahead_S = sign_S * (ratio_S - zero_point)
    loss = (weights_S * torch.sigmoid(-options.beta * ahead_S)).sum()
    reward_S = options.beta * ratio_S
    return loss, {
        "accuracy": (labelled * wins(ahead_S)).sum(),
        "wanted": wanted.sum().to(ratio_S.dtype),
        "wanted_reward": (wanted * reward_S).sum(),
        "unwanted_reward": (~wanted * reward_S).sum(),
        "kl": labelled.sum() * zero_point,
    }


def _logistic(x: Float[Tensor, " P"], smoothing: float) -> Float[Tensor, " P"]:
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def _log1mexp(x: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """log(1 − e^x) for x ≤ 0: near 0 by expm1, far from it by log1p, each where the other loses digits."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)  # a probability of 1 has infinite odds
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x.where(~near, -1.0))))


WITHOUT_REFERENCE = frozenset({"slic", "simpo", "orpo", "cpo", "sft"})
"""The losses that ask no reference: where only these are mixed, it need not be computed."""

PER_TOKEN = frozenset({"ipo", "sigmoid_norm", "simpo", "orpo"})
"""The losses that compare means over tokens."""

LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "slic": slic,
    "exo": exo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sppo": sppo,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "sft": sft,
}
