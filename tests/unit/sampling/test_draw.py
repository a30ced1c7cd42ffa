"""Tokens out of logits: the law of what is drawn."""

import pytest
import torch

from burnish.sampling.draw import drawn, most_likely, probabilities
from burnish.sampling.streams import uniforms

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, -3.0, 1.0, float("-inf")])
NUM = 40_000


def sample(law: torch.Tensor) -> torch.Tensor:
    """How often each token is drawn, by as many streams as there are draws."""
    seeds = torch.arange(NUM)
    tokens = drawn(law.expand(NUM, -1), uniforms(seeds, seeds % 7))
    return torch.bincount(tokens, minlength=len(LOGITS)).double()


def by_definition(temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Token by token, as one would do it by hand."""
    p = [float(x) for x in torch.softmax(LOGITS.double() / temperature, 0)]
    ranked = sorted(range(len(p)), key=lambda v: -p[v])[: top_k or len(p)]
    held, total, kept = 0.0, sum(p[v] for v in ranked), []
    for v in ranked:
        if held >= top_p * total:
            break
        kept.append(v)
        held += p[v]
    return torch.tensor([p[v] / held if v in kept else 0.0 for v in range(len(p))], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8), (4, 0.75), (1, 1.0), (0, 1e-9), (99, 1.0)])
def test_draws_follow_the_law(temperature, top_k, top_p):
    law = probabilities(LOGITS[None], temperature, top_k, top_p)[0]
    expected = by_definition(temperature, top_k, top_p)
    torch.testing.assert_close(law / law.sum(), expected, rtol=1e-12, atol=0)
    counts = sample(law)
    assert counts[expected == 0].sum() == 0
    likely = expected * NUM >= 5
    squares = (counts - expected * NUM)[likely] ** 2 / (expected * NUM)[likely]
    assert squares.sum() < 24.4  # chi-square with 7 degrees, 1 in 1,000


def test_tokens_that_tie_at_the_border_are_all_kept():
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    assert (probabilities(logits, 1.0, top_k=2) > 0).tolist() == [[True, True, True, True, False]]
    assert (probabilities(logits, 1.0, top_p=0.5) > 0).tolist() == [[True, True, True, True, False]]


def test_the_ends_of_the_unit_interval_give_tokens_that_can_occur():
    law = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    below_one = 1 - 2.0**-53
    for scale in (1.0, 0.3, 1 + 2.0**-52, 3.7):
        assert drawn(law * scale, torch.tensor([0.0], dtype=torch.float64)).item() == 1
        assert drawn(law * scale, torch.tensor([below_one], dtype=torch.float64)).item() == 4
    assert drawn(law, torch.tensor([0.25], dtype=torch.float64)).item() == 3  # a border belongs to what follows it


def test_a_row_does_not_depend_on_the_others():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    numbers = uniforms(torch.arange(6), torch.zeros(6, dtype=torch.long))
    together = drawn(probabilities(logits, 0.9, 20, 0.95), numbers)
    alone = [drawn(probabilities(logits[i : i + 1], 0.9, 20, 0.95), numbers[i : i + 1]) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))
    assert most_likely(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]
