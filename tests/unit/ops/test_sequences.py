import torch

from burnish.ops.sequences import padded_sums, sequence_last, sequence_means, sequence_sums
from tests.tiny import tiny_batch, tiny_shared_batch


def test_numbers_per_position_become_numbers_per_sequence() -> None:
    batch = tiny_batch([2, 3, 1])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    weights = torch.tensor([1.0, 3.0, 0.0, 0.0, 0.0, 2.0])
    assert sequence_sums(values, batch).tolist() == [3.0, 12.0, 6.0]
    assert sequence_means(values, weights, batch).tolist() == [1.75, 0.0, 6.0]
    assert sequence_last(values, batch).tolist() == [2.0, 5.0, 6.0]
    assert sequence_last(torch.stack([values, -values], 1), batch).tolist() == [[2.0, -2.0], [5.0, -5.0], [6.0, -6.0]]


def test_the_mean_of_an_unweighted_sequence_has_a_finite_gradient() -> None:
    values = torch.ones(3, requires_grad=True)
    sequence_means(values, torch.tensor([0.0, 0.0, 1.0]), tiny_batch([2, 1])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 0.0, 1.0]


def test_sums_by_way_of_rows_are_the_same() -> None:
    shared = tiny_shared_batch([(5, (3, 1, 4)), (2, (2, 6))])[1]
    for batch in (tiny_batch([2, 3, 1, 17]), shared):
        values = torch.randn(len(batch.tokens), dtype=torch.float64, requires_grad=True)
        factors = torch.randn(batch.num_sequences, dtype=torch.float64)
        one, other = sequence_sums(values, batch), padded_sums(values, batch)
        torch.testing.assert_close(other, one)
        gradients = [torch.autograd.grad((sums * factors).sum(), values)[0] for sums in (one, other)]
        torch.testing.assert_close(gradients[1], gradients[0])
        assert torch.equal(gradients[0], factors[batch.sequence])
