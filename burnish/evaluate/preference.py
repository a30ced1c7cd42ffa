"""What a reward model is worth: whether it orders held-out answers as people did, how sure it is, what it goes by."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import numpy
import torch
from numpy.typing import NDArray

from burnish.data.comparing import collate_comparisons
from burnish.data.comparisons import Comparisons
from burnish.data.packing import pack
from burnish.engine.rewards import Normaliser
from burnish.engine.roles import Role
from burnish.engine.room import Room
from burnish.ops.sequences import sequence_last
from burnish.types import Batch

Array = NDArray[numpy.float64]

NUM_BINS = 10
"""Of the confidences, 50 % to 100 %, that calibration is measured in."""
NUM_REFERENCE = 2048
"""Comparisons, evenly taken from all, whose answers the normaliser is measured on."""
STRONG = 0.5
"""A correlation of score and length that is worth a warning."""


@torch.no_grad()
def score_comparisons(
    role: Role,
    comparisons: Comparisons,
    microbatch_tokens: int,
    share_prefix: bool = True,
    room: Room | None = None,
) -> list[float]:
    """The raw score of every sequence of the comparisons, in their order; dropout is off.

    Batches that memory does not suffice for are divided: see `room`.
    """
    model, room = role.model, room or Room()
    found = [0.0] * len(comparisons.sequences)
    sizes = comparisons.sizes(share_prefix)
    training = model.training
    model.eval()

    def read(batch: Batch) -> list[float]:
        return sequence_last(role.values(batch), batch).tolist()

    for members in pack(sizes, max(microbatch_tokens, int(sizes.max(initial=0)))):
        batch = collate_comparisons([comparisons[unit] for unit in members], share_prefix).to(model.device)
        scores = (score for _, part in room.each([batch], read) for score in part)
        for unit in members:
            for sequence in range(int(comparisons.units[unit]), int(comparisons.units[unit + 1])):
                found[sequence] = next(scores)
    model.train(training)
    return found


def ranking_metrics(scores: Sequence[float], comparisons: Comparisons) -> dict[str, float]:
    """How well raw scores order the answers, each comparison weighing 1; in float64.

    `loss`: −log σ(r_c − r_r − margin). `accuracy`: the share of pairs in order, ties half. `log_loss`: −log σ(r_c −
    r_r), and `calibration_error`: the mean distance between confidence σ(|r_c − r_r|) and accuracy, in ten bins of
    confidence (Guo et al. 2017, eq. 3). `margin`: r_c − r_r. `length_correlation`: of score and length within
    comparisons; nothing where no two answers differ in length. `longer_chosen`: the share of pairs whose better answer
    is the longer, ties half. Length is the number of tokens trained on.
    """
    scores_S, lengths_S = numpy.asarray(scores, numpy.float64), _answer_lengths(comparisons)
    better_P, worse_P, weights_P = _pairs(comparisons)
    total = float(weights_P.sum())
    difference_P = scores_S[better_P] - scores_S[worse_P]

    def mean(values_P: Array) -> float:
        return float((weights_P * values_P).sum() / total)

    metrics = {
        "loss": mean(_softplus(comparisons.margins - difference_P)),
        "accuracy": mean(_ahead(difference_P)),
        "log_loss": mean(_softplus(-difference_P)),
        "calibration_error": calibration_error(difference_P, weights_P),
        "margin": mean(difference_P),
        "longer_chosen": mean(_ahead(lengths_S[better_P] - lengths_S[worse_P])),
    }
    units = comparisons.units.tolist()
    correlation = _correlation(_centred(scores_S, units), _centred(lengths_S, units))
    return metrics | ({} if correlation is None else {"length_correlation": correlation})


def calibration_error(difference_P: Array, weights_P: Array) -> float:
    """Σ_b (w_b / w) · |accuracy_b − confidence_b| over bins of the confidence max(σ(d), 1 − σ(d)), between ½ and 1."""
    confidence_P = 1 / (1 + numpy.exp(-numpy.abs(difference_P)))
    bins_P = numpy.minimum(((confidence_P - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps_P = weights_P * (_ahead(difference_P) - confidence_P)
    return float(sum(abs(gaps_P[bins_P == b].sum()) for b in range(NUM_BINS)) / weights_P.sum())


def measure_normaliser(
    role: Role,
    comparisons: Comparisons,
    microbatch_tokens: int,
    of: str,
    share_prefix: bool = True,
    room: Room | None = None,
) -> Normaliser:
    """Mean and deviation of raw scores: of the best answers of the comparisons (`chosen`), or of all (`all`)."""
    count = min(len(comparisons), NUM_REFERENCE)
    taken = Comparisons.of(comparisons[i * len(comparisons) // count] for i in range(count))
    scores_S = numpy.asarray(score_comparisons(role, taken, microbatch_tokens, share_prefix, room))
    if of == "chosen":
        better_P, worse_P, _ = _pairs(taken)
        scores_S = scores_S[sorted(set(better_P.tolist()) - set(worse_P.tolist()))]
    mean, deviation = float(scores_S.mean()), float(scores_S.std())
    return Normaliser(mean, deviation if deviation > 1e-6 else 1.0)


def doubts(metrics: dict[str, float], count: int) -> list[str]:
    """What `eval_` metrics of so many held-out comparisons give reason to look at, one line each."""
    found: list[str] = []
    accuracy, error = metrics["eval_accuracy"], math.sqrt(0.25 / max(1, count))
    if accuracy < 0.5 + 2 * error:
        found.append(
            f"accuracy on held-out comparisons is {accuracy:.1%} of {count}, which chance gives as well: more data, "
            "more steps, another optim.lr, or labels that follow no rule"
        )
    correlation = metrics.get("eval_length_correlation", 0.0)
    if abs(correlation) > STRONG:
        more, share = "longer" if correlation > 0 else "shorter", metrics["eval_longer_chosen"]
        found.append(
            f"{more} answers score higher (correlation {correlation:+.2f}), and in {share:.0%} of the held-out pairs "
            "the longer answer is the better one: a policy will learn length first; see docs/reward.md"
        )
    return found


def _pairs(comparisons: Comparisons) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64], Array]:
    """(better, worse, weight) of every pair, by the numbers of the sequences; a comparison's pairs weigh 1 together."""
    counts = numpy.diff(comparisons.pair_starts)
    offsets_P = numpy.repeat(comparisons.units[:-1], counts)
    weights_P = numpy.repeat(1 / numpy.maximum(counts, 1), counts)
    pairs = comparisons.pairs.astype(numpy.int64)
    return pairs[:, 0] + offsets_P, pairs[:, 1] + offsets_P, weights_P


def _answer_lengths(comparisons: Comparisons) -> Array:
    weighted = numpy.concatenate([[0], numpy.cumsum(comparisons.sequences.weights != 0)])
    return numpy.diff(weighted[comparisons.sequences.starts]).astype(numpy.float64)


def _ahead(difference_P: Array) -> Array:
    """1 where the first is ahead, ½ where the two tie, else 0."""
    return numpy.heaviside(difference_P, 0.5)


def _softplus(values: Array) -> Array:
    return numpy.logaddexp(0.0, values)


def _centred(values_S: Array, units: list[int]) -> Array:
    """The values less the mean of their comparison."""
    return numpy.concatenate([values_S[a:b] - values_S[a:b].mean() for a, b in pairwise(units)])


def _correlation(first: Array, second: Array) -> float | None:
    spread = math.sqrt(float((first**2).sum()) * float((second**2).sum()))
    return float(cast(float, (first * second).sum())) / spread if spread > 0 else None
