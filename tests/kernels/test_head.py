"""The head's row kernels in Triton's interpreter against float64, at odd shapes, with memory that holds rubbish."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels import head  # after Triton is known to be there
from burnish.ops import log_probs

SHAPES = [(1, 1), (1, 17), (3, 256), (2, 257), (5, 1000), (2, 4096), (3, 4097), (2, 9001)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, or 127 where it holds no fractions."""
    empty = torch.empty

    def poison(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        if made.dtype == torch.bool:
            made.view(torch.uint8).fill_(127)
            return made
        return made.fill_(float("nan") if made.is_floating_point() else 127)

    monkeypatch.setattr(torch, "empty", poison)


def problem(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that differ in scale from row to row, and targets: in half of the rows, the highest logit's."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * torch.linspace(1, 12, shape[0])[:, None]
    targets = torch.randint(0, shape[1], shape[:1], generator=generator)
    return logits, torch.where(torch.arange(shape[0]) % 2 == 0, targets, logits.argmax(1))


def exact(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probabilities, log of the sums, their gradient) by autograd in float64."""
    given = logits.double().requires_grad_()
    z = given if softcap is None else softcap * torch.tanh(given / softcap)
    found = torch.log_softmax(z, 1).gather(1, targets[:, None])[:, 0]
    found.sum().backward()
    assert given.grad is not None
    return found.detach(), z.detach().logsumexp(1), given.grad


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_read_as_float64_reads_them(shape: tuple[int, int], softcap: float | None) -> None:
    logits, targets = problem(shape)
    expected, totals, gradient = exact(logits, targets, softcap)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    for dtype in (torch.float32, torch.float16):
        found = head.read_rows(logits.clone(), targets, softcap, dtype)
        torch.testing.assert_close(found[0].double(), expected, rtol=2e-6, atol=3e-6)
        torch.testing.assert_close(found[1].double(), totals, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[2], capped.argmax(1) == targets)
        assert found[3] is not None
        assert found[3].dtype == dtype
        bound = 1e-6 if dtype == torch.float32 else 2**-11
        torch.testing.assert_close(found[3].double(), gradient, rtol=bound, atol=4e-6)
        alone = head.read_rows(logits.clone(), targets, softcap, dtype, wants_gradient=False)
        assert alone[3] is None
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(alone[:3], found[:3], strict=True))


def test_logits_of_half_precision_are_read_too() -> None:
    logits, targets = problem((3, 700))
    half = logits.half()
    expected, _, gradient = exact(half, targets, None)
    found = head.read_rows(half.clone(), targets, None, torch.float16)
    torch.testing.assert_close(found[0].double(), expected, rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(found[3].double(), gradient, rtol=2**-11, atol=1e-6)


def test_the_gradient_lies_in_the_memory_of_the_logits() -> None:
    logits, targets = problem((4, 5000))
    gradient = head.read_rows(logits, targets, None, torch.float16)[3]
    assert gradient is not None
    assert gradient.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    assert gradient.stride() == (10000, 1)


def test_without_a_gradient_the_logits_stay() -> None:
    logits, targets = problem((2, 300))
    before = logits.clone()
    head.read_rows(logits, targets, 3.0, torch.float16, wants_gradient=False)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("columns", [7, 5000])
def test_of_equal_logits_the_first_is_the_highest(columns: int) -> None:
    """As torch.argmax has it, within a chunk of columns and across chunks."""
    places = (0, 3, columns - 1)
    logits = torch.zeros(len(places), columns)
    logits[:, list(places)] = 2.0
    assert head.read_rows(logits, torch.tensor(places), None, torch.float32, wants_gradient=False)[2].tolist() == [
        True,
        False,
        False,
    ]
    flat = torch.zeros(2, columns)
    assert head.read_rows(flat, torch.tensor([0, 1]), None, torch.float32, wants_gradient=False)[2].tolist() == [
        True,
        False,
    ]


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    logits = torch.tensor([[3e37, 0.0, -3e37], [-100.0, -100.0, -100.0]])
    found = head.read_rows(logits, torch.tensor([1, 2]), None, torch.float32)
    torch.testing.assert_close(found[0], torch.tensor([-3e37, -torch.log(torch.tensor(3.0))]))
    assert found[3] is not None
    torch.testing.assert_close(found[3], torch.tensor([[-1.0, 1.0, 0.0], [-1 / 3, -1 / 3, 2 / 3]]), rtol=1e-5, atol=0)


def test_what_is_no_number_shows() -> None:
    logits, targets = problem((2, 300))
    logits[1, 200] = float("nan")
    found = head.read_rows(logits, targets, None, torch.float32)[0]
    assert found.isnan().tolist() == [False, True]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slices_of_the_vocabulary_together_are_the_weighted_gradient(softcap: float | None, dtype: torch.dtype) -> None:
    logits, targets = problem((5, 9001))
    _, totals, gradient = exact(logits, targets, softcap)
    weights = torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0])
    parts = [
        head.logit_gradient(logits[:, start:stop].clone(), targets, totals.float(), weights, start, softcap, dtype)
        for start, stop in ((0, 300), (300, 4999), (4999, 9001))
    ]
    bound = 2e-6 if dtype == torch.float32 else 2**-11
    expected = gradient * weights.double()[:, None]
    torch.testing.assert_close(torch.cat(parts, 1).double(), expected, rtol=bound, atol=3e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_operator_over_the_kernels_is_the_operator_without(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, trained: bool
) -> None:
    """The same chunks, slices, strides and accumulators as on a GPU, in fp32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(11, 16, generator=generator), torch.randn(11, generator=generator)
    matrix, targets = torch.randn(300, 16, generator=generator), torch.randint(0, 300, (11,), generator=generator)
    found: list[list[torch.Tensor]] = []
    for kernels in (False, True):
        monkeypatch.setattr(log_probs, "_has_kernel", lambda logits, answer=kernels: answer)
        leaves = [hidden.clone().requires_grad_(), matrix.clone().requires_grad_(trained)]
        log_prob, correct = log_probs.target_log_probs(*leaves, targets, softcap, chunk_logits=4 * 300)
        (log_prob * weights).sum().backward()
        found.append([log_prob.detach(), correct, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == 3 + trained
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_no_rows_are_no_launch() -> None:
    logits, targets = torch.randn(0, 40), torch.zeros(0, dtype=torch.long)
    found = head.read_rows(logits, targets, None, torch.float32)
    assert [len(part) for part in found if part is not None] == [0, 0, 0, 0]
    weights = torch.zeros(0)
    assert head.logit_gradient(logits, targets, weights, weights, 0, None, torch.float32).shape == (0, 40)
