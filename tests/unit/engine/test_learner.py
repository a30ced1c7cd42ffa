"""The learner on a table of logits: small enough to know every gradient."""

import dataclasses

import pytest
import torch
from torch import nn

from burnish.engine.learner import Learner, NonFinite
from burnish.engine.mesh import Mesh
from burnish.losses.likelihood import cross_entropy
from burnish.types import Batch
from tests.tiny import tiny_batch

VOCABULARY = 11


class Table(nn.Module):
    """Predicts the next token from the last one alone."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)))

    def objective(self, batch: Batch):
        log_probs = self.logits.log_softmax(-1)[batch.tokens, batch.targets]
        correct = self.logits[batch.tokens].argmax(-1) == batch.targets
        return cross_entropy(log_probs, batch.weights, correct)


def learner(table: Table, lr: float = 0.1, clip: float = 0.0) -> Learner:
    parameters = dict(table.named_parameters())
    return Learner(
        parameters, torch.optim.SGD(parameters.values(), lr), lambda step: lr, clip, Mesh(torch.device("cpu"))
    )


def count(batch: Batch) -> float:
    return batch.total_weight


def test_gradient_is_that_of_the_mean_over_all_weighted_tokens():
    table, batch = Table(), tiny_batch([5, 9], VOCABULARY)
    probabilities = table.logits.detach().double().softmax(-1)
    expected = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for token, target, weight in zip(batch.tokens, batch.targets, batch.weights, strict=True):
        expected[token] += weight * (probabilities[token] - torch.eye(VOCABULARY, dtype=torch.float64)[target])
    expected /= batch.weights.sum()
    before = table.logits.detach().clone()
    metrics = learner(table, lr=1.0).step([batch], table.objective, count)
    torch.testing.assert_close((before - table.logits.detach()).double(), expected, rtol=1e-5, atol=1e-6)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)


@pytest.mark.parametrize("cut", [[8], [4, 4], [1] * 8, [7, 1]])
def test_micro_batches_do_not_change_loss_gradient_or_weights(cut):
    lengths = [3, 17, 5, 8, 2, 30, 4, 6]
    sequences = [tiny_batch([n], VOCABULARY, seed=i) for i, n in enumerate(lengths)]
    whole, parted = Table(), Table()
    expected = learner(whole).step([joined(sequences)], whole.objective, count)
    parts, begin = [], 0
    for size in cut:
        parts.append(joined(sequences[begin : begin + size]))
        begin += size
    metrics = learner(parted).step(parts, parted.objective, count)
    assert metrics == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(parted.logits, whole.logits, rtol=1e-5, atol=1e-6)


def joined(batches: list[Batch]) -> Batch:
    """Batches laid end to end, as far as a table of logits looks at them."""
    tensors = {name: torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "targets", "weights")}
    return dataclasses.replace(batches[0], **tensors, total_weight=sum(b.total_weight for b in batches))


def test_clipping_limits_the_whole_gradient():
    table, batch = Table(), tiny_batch([9], VOCABULARY)
    before = table.logits.detach().clone()
    metrics = learner(table, lr=1.0, clip=0.01).step([batch], table.objective, count)
    assert metrics["grad_norm"] > 0.01
    assert (before - table.logits.detach()).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_non_finite_loss_names_its_rows_and_changes_no_weight():
    table, batch = Table(), dataclasses.replace(tiny_batch([4, 4], VOCABULARY), rows=(31, 7))
    before = table.logits.detach().clone()

    def broken(batch):
        loss, metrics = table.objective(batch)
        return loss * float("nan"), metrics

    with pytest.raises(NonFinite) as caught:
        learner(table).step([batch], broken, count)
    assert caught.value.rows == [7, 31]
    assert caught.value.quantity == "loss"
    assert torch.equal(table.logits, before)
    assert table.logits.grad is None


def test_a_step_with_nothing_to_learn_from_is_refused():
    table, batch = Table(), tiny_batch([4], VOCABULARY)
    empty = dataclasses.replace(batch, weights=torch.zeros(4), total_weight=0.0)
    with pytest.raises(ValueError, match="every weight in it is 0"):
        learner(table).step([empty], table.objective, count)
