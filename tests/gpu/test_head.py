"""The head at real shapes on a GPU: kernels against float64, and what the operator takes of memory."""

from itertools import pairwise

import pytest
import torch

from burnish.ops.log_probs import Reading, logit_gradient, read_rows, target_log_probs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTH = 4096
VOCABULARIES = [32000, 128256]
LEAN = 1 << 25


def drawn(rows: int, vocabulary: int, width: int = WIDTH, trained: bool = False) -> tuple[torch.Tensor, ...]:
    """Hidden states whose logits spread by about 4, a head, and targets, half of them likely ones."""
    generator = torch.Generator("cuda").manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator, device="cuda").bfloat16()
    head = (torch.randn(vocabulary, width, generator=generator, device="cuda") * 4 / width**0.5).bfloat16()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator, device="cuda")
    targets[::2] = torch.mm(hidden[::2], head.T, out_dtype=torch.float32).argmax(1)
    return hidden.requires_grad_(), head.requires_grad_(trained), targets


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("vocabulary", [*VOCABULARIES, 50257, 130])
def test_rows_are_read_as_float64_reads_them(vocabulary: int, softcap: float | None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(129, vocabulary, generator=generator, device="cuda") * 4
    targets = torch.randint(0, vocabulary, (129,), generator=generator, device="cuda")
    targets[::2] = logits[::2].argmax(1)
    exact = logits.double().requires_grad_()
    z = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    expected = z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    weights = torch.linspace(-1, 2, 129, device="cuda")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    given = logits.clone()
    found = read_rows(given, targets, softcap, torch.bfloat16)
    torch.testing.assert_close(found.log_probs.double(), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(found.totals.double(), z.logsumexp(1), rtol=2e-6, atol=1e-6)
    assert torch.equal(found.correct, logits.argmax(1) == targets)
    assert found.gradient is not None
    alone = read_rows(logits.clone(), targets, softcap, torch.bfloat16, wants_gradient=False)
    assert alone.gradient is None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(alone[:3], found[:3], strict=True))
    assert found.gradient.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    torch.testing.assert_close(found.gradient.double(), gradient, rtol=2**-8, atol=1e-5)
    reading = Reading(targets, found.totals, weights)
    cuts = sorted((0, 64, vocabulary // 3, vocabulary))
    parts = [
        logit_gradient(logits[:, start:stop].contiguous(), reading, start, softcap, torch.bfloat16)
        for start, stop in pairwise(cuts)
    ]
    expected = gradient * weights.double()[:, None]
    torch.testing.assert_close(torch.cat(parts, 1).double(), expected, rtol=2**-8, atol=2e-5)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 32000), (300, 32000), (2500, 32000), (700, 128256)])
def test_it_errs_at_most_twice_as_much_as_plain_bf16(rows: int, vocabulary: int, trained: bool) -> None:
    hidden, head, targets = drawn(rows, vocabulary, 1024, trained)
    weights = torch.linspace(0.5, 1.5, rows, device="cuda")
    log_probs, correct = target_log_probs(hidden, head, targets, chunk_logits=LEAN)
    leaves = [hidden, head] if trained else [hidden]
    ours = [log_probs.detach(), *torch.autograd.grad((log_probs * weights).sum(), leaves)]
    plain, exact = (plainly(hidden, head, targets, weights, dtype) for dtype in (torch.bfloat16, torch.float64))
    for found, rough, right in zip(ours, plain, exact, strict=False):
        assert (found.double() - right).norm() <= 2 * (rough.double() - right).norm() + 1e-6 * right.norm()
    assert correct[::2].float().mean() > 0.99


def plainly(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Log-probabilities and both gradients by autograd over all logits at once; bf16 logits, fp32 softmax."""
    leaves = [part.detach().to(dtype).requires_grad_() for part in (hidden, head)]
    logits = leaves[0] @ leaves[1].T
    logits = logits.float() if dtype == torch.bfloat16 else logits
    found = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), leaves)]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("lean", [False, True])
def test_the_head_takes_little_memory(vocabulary: int, lean: bool) -> None:
    """Beyond the head itself: one chunk, and the gradient of the hidden states."""
    hidden, head, targets = drawn(8192, vocabulary)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    log_probs, _ = target_log_probs(hidden, head, targets, chunk_logits=LEAN if lean else None)
    forward = torch.cuda.max_memory_allocated() - before
    log_probs.sum().backward()
    whole = torch.cuda.max_memory_allocated() - before
    unit = hidden.numel() * hidden.element_size()
    assert forward <= (LEAN if lean else 2 * LEAN) * 4 + unit + 2**20
    assert whole <= max(forward, 2 * unit + 2**20)
    assert not lean or whole <= 203e6


def test_a_trained_head_is_summed_without_a_wide_copy() -> None:
    hidden, head, targets = drawn(8192, 32000, trained=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    target_log_probs(hidden, head, targets, chunk_logits=LEAN)[0].sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = head.numel() * 2 + hidden.numel() * 2
    assert peak <= gradients + hidden.numel() * 4 + LEAN * 4 + 2**20
