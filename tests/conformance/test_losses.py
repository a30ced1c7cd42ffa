"""What every listed loss must do; listing one in `LOSSES` tests it here."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from burnish.losses import kl, likelihood, policy, preference, reward
from burnish.ops.sequences import sequence_last
from tests.unit.losses.packs import compared

UNITS = (("0110", "01110"), ("010", "0110", "0100110"), ("00110", "010", "01010", "0110"), ("0110", "0010"))
"""Comparisons of two, three and four answers, some of several turns."""

MARGINS = (0.0, 0.1, 0.2)
OPTIONS = preference.Options(beta=0.4, label_smoothing=0.1, margin=0.7, wanted_weight=1.2, unwanted_weight=0.8)

Columns = dict[str, torch.Tensor]


def of_pairs(name):
    def objective(columns: Columns, batch):
        reference = None if name in preference.WITHOUT_REFERENCE else columns["reference"]
        pairs = preference.pairs_of(columns["log_probs"], reference, batch)
        return preference.preference_loss(pairs, batch.pair_weights, {name: 1.0, "sft": 0.3}, OPTIONS)

    return objective


def of_labels(columns: Columns, batch):
    ratio = preference.answer_sums(columns["log_probs"], batch) - preference.answer_sums(columns["reference"], batch)
    return preference.kto_loss(ratio, batch.labels, 0.3, OPTIONS)


def of_scores(loss):
    return lambda columns, batch: loss(sequence_last(columns["log_probs"], batch), batch, centering=0.01)


def of_policy(loss):
    return lambda columns, batch: loss(columns["log_probs"], columns["old"], columns["target"], batch.weights)


def of_divergence(name, corrected):
    def objective(columns: Columns, batch):
        old = columns["old"] if corrected else None
        return policy.kl_loss(columns["log_probs"], columns["reference"], batch.weights, name, old)

    return objective


def of_likelihood(loss):
    return lambda columns, batch: loss(columns["log_probs"], batch.weights, columns["target"] > 0)


OBJECTIVES = {
    **{f"likelihood.{name}": of_likelihood(loss) for name, loss in likelihood.LOSSES.items()},
    **{f"preference.{name}": of_pairs(name) for name in preference.LOSSES},
    "preference.kto": of_labels,
    **{f"reward.{name}": of_scores(loss) for name, loss in reward.LOSSES.items()},
    **{f"policy.{name}": of_policy(loss) for name, loss in policy.LOSSES.items()},
    **{f"kl.{name}": of_divergence(name, False) for name in kl.ESTIMATORS},
    **{f"kl.{name}.corrected": of_divergence(name, True) for name in kl.ESTIMATORS},
}
"""Each: (columns of numbers by position, batch) -> (sum, {name: sum}); `log_probs` is what is trained."""

every_loss = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def inputs(dtype: torch.dtype = torch.float64, units=UNITS):
    generator = torch.Generator().manual_seed(0)
    batch = compared(units, dtype)
    log_probs = -3 * torch.rand(len(batch.weights), generator=generator, dtype=torch.float64) - 0.01
    names = ("reference", "old", "target")
    noise = {name: torch.randn(log_probs.shape, generator=generator, dtype=torch.float64) for name in names}
    columns = {
        "log_probs": log_probs,
        "reference": log_probs + 0.5 * noise["reference"],
        "old": log_probs + 0.3 * noise["old"],
        "target": noise["target"],
    }
    return {name: column.to(dtype) for name, column in columns.items()}, batch


def evaluate(objective, columns: Columns, batch):
    """Loss, gradient and named sums."""
    log_probs = columns["log_probs"].clone().requires_grad_()
    loss, metrics = objective(columns | {"log_probs": log_probs}, batch)
    loss.backward()
    return loss.detach(), log_probs.grad, {name: metric.detach() for name, metric in metrics.items()}


@every_loss
@pytest.mark.parametrize(
    "cuts", [(1,), (2, 3), (1, 2, 3)], ids=["two parts", "three parts", "one comparison at a time"]
)
def test_any_cut_into_micro_batches_gives_the_same_sums(objective, cuts):
    columns, batch = inputs()
    whole, gradient, metrics = evaluate(objective, columns, batch)
    ends = [0, *accumulate(sum(map(len, unit)) for unit in UNITS)]
    pairs = [0, *accumulate(len(unit) * (len(unit) - 1) // 2 for unit in UNITS)]
    sequences = [0, *accumulate(len(unit) for unit in UNITS)]
    parts = []
    for a, b in zip((0, *cuts), (*cuts, len(UNITS)), strict=True):
        part = replace(
            compared(UNITS[a:b]),
            margins=batch.margins[pairs[a] : pairs[b]],
            labels=batch.labels[sequences[a] : sequences[b]],
        )
        parts.append(evaluate(objective, {n: column[ends[a] : ends[b]] for n, column in columns.items()}, part))
    torch.testing.assert_close(sum(loss for loss, _, _ in parts), whole)
    torch.testing.assert_close(torch.cat([gradient for _, gradient, _ in parts]), gradient)
    for name, metric in metrics.items():
        torch.testing.assert_close(sum(named[name] for _, _, named in parts), metric)


@every_loss
def test_gradient_is_the_numerical_one(objective):
    columns, batch = inputs()
    log_probs = columns["log_probs"].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective(columns | {"log_probs": x}, batch)[0], log_probs)


@every_loss
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e9])
def test_poisoned_positions_without_weight_change_nothing(objective, poison):
    columns, batch = inputs()
    read = batch.weights != 0
    read[batch.starts[1:].long() - 1] = True  # a reward model's score stands at the last position
    unread = ~read if objective is OBJECTIVES["reward.ranking"] else batch.weights == 0
    loss, gradient, metrics = evaluate(objective, columns, batch)
    poisoned = {name: column.masked_fill(unread, poison) for name, column in columns.items()}
    poisoned_loss, poisoned_gradient, poisoned_metrics = evaluate(objective, poisoned, batch)
    assert torch.equal(poisoned_loss, loss)
    assert torch.equal(poisoned_gradient, gradient)
    assert all(torch.equal(poisoned_metrics[name], metric) for name, metric in metrics.items())


@every_loss
@pytest.mark.parametrize("extreme", [-1e12, 0.0])
@pytest.mark.parametrize("others", [-1e12, 0.0, None])
def test_extreme_log_probs_keep_a_finite_gradient(objective, extreme, others):
    columns, batch = inputs(dtype=torch.float32)
    if others is not None:
        columns = {n: column.fill_(others) if n != "target" else column for n, column in columns.items()}
    columns["log_probs"] = torch.full_like(columns["log_probs"], extreme)
    loss, gradient, _ = evaluate(objective, columns, batch)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@every_loss
def test_nothing_to_learn_from_is_zero(objective):
    columns, batch = inputs()
    silent = {name: torch.zeros_like(getattr(batch, name)) for name in ("weights", "pair_weights", "labels")}
    loss, gradient, metrics = evaluate(objective, columns, replace(batch, **silent))
    assert loss == 0
    assert not gradient.any()
    assert all(metric == 0 for metric in metrics.values())
