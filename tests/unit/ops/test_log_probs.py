import pytest
import torch

from burnish.ops import log_probs
from burnish.ops.log_probs import target_log_probs


def whole(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """The definition, with every logit at once."""
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two rows, so that a handful of rows already makes several."""
    monkeypatch.setitem(log_probs.CHUNK_LOGITS, "cpu", 2 * 13)


def problem(num_rows: int = 7, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 5, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(13, 5, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, head, torch.randint(0, 13, (num_rows,), generator=generator)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)])
def test_gradients_are_right_in_float64(softcap: float | None, trained: tuple[bool, bool]) -> None:
    hidden, head, targets = problem()
    hidden.requires_grad_(trained[0])
    head.requires_grad_(trained[1])
    assert torch.autograd.gradcheck(lambda h, w: target_log_probs(h, w, targets, softcap)[0], (hidden, head))


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_values_equal_the_definition(softcap: float | None) -> None:
    hidden, head, targets = problem()
    log_prob, correct = target_log_probs(hidden, head, targets, softcap)
    torch.testing.assert_close(log_prob, whole(hidden, head, targets, softcap))
    assert torch.equal(correct, (hidden @ head.T).argmax(-1) == targets)


def test_chunks_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for budget in (13, 3 * 13, 1000):
        monkeypatch.setitem(log_probs.CHUNK_LOGITS, "cpu", budget)
        hidden, head, targets = problem()
        hidden.requires_grad_()
        head.requires_grad_()
        weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
        (target_log_probs(hidden, head, targets)[0] * weights).sum().backward()
        gradients.append((hidden.grad, head.grad))
    for hidden_grad, head_grad in gradients[1:]:
        torch.testing.assert_close(hidden_grad, gradients[0][0])
        torch.testing.assert_close(head_grad, gradients[0][1])


def test_low_precision_gives_fp32_probabilities_and_gradients_in_its_own_dtype() -> None:
    hidden, head, targets = problem(dtype=torch.bfloat16)
    hidden.requires_grad_()
    log_prob, _ = target_log_probs(hidden, head, targets)
    log_prob.sum().backward()
    assert log_prob.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    exact = hidden.detach().double().requires_grad_()
    whole(exact, head.double(), targets, None).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("trained_head", [False, True])
def test_nothing_scored_gives_nothing_and_a_zero_gradient(trained_head: bool) -> None:
    hidden, head, targets = problem(num_rows=0)
    hidden.requires_grad_()
    head.requires_grad_(trained_head)
    log_prob, correct = target_log_probs(hidden, head, targets)
    assert log_prob.shape == correct.shape == (0,)
    log_prob.sum().backward()
    assert hidden.grad is not None
    assert not trained_head or torch.equal(head.grad, torch.zeros_like(head))


def test_no_tensor_as_large_as_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(log_probs.CHUNK_LOGITS, "cpu", 4 * 512)
    hidden, head = torch.randn(64, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    with largest_tensor() as largest:
        target_log_probs(hidden, head, torch.zeros(64, dtype=torch.long))[0].sum().backward()
    assert largest[0] == 512 * 8  # the head's own gradient; all logits would be 64 * 512


class largest_tensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the numbers in the largest tensor that any operation returns."""

    def __enter__(self) -> list[int]:
        super().__enter__()
        self.largest = [0]
        return self.largest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest[0] = max(self.largest[0], tensor.numel())
        return out


@pytest.mark.parametrize(
    ("num_rows", "row_size", "budget", "sizes"),
    [
        (2500, 32000, 1 << 25, [1024, 1024, 452]),  # 1048 would fit: the last tile of a matmul would be nearly empty
        (600, 128256, 1 << 26, [512, 88]),
        (300, 1000, 127_000, [127, 127, 46]),
        (3, 1000, 1, [1, 1, 1]),
        (0, 1000, 1 << 20, []),
        (5, 0, 1 << 20, [5]),
    ],
)
def test_chunks_are_whole_tiles_within_the_budget(num_rows: int, row_size: int, budget: int, sizes: list[int]) -> None:
    chunks = log_probs.chunk_rows(num_rows, row_size, torch.device("cuda"), budget)
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [row for chunk in chunks for row in range(num_rows)[chunk]] == list(range(num_rows))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_trained_head_in_low_precision_has_gradients_of_its_dtype(softcap: float | None) -> None:
    """Many slices of the vocabulary: what they add to the hidden states' gradient is summed in fp32."""
    hidden, head, targets = problem(num_rows=40, dtype=torch.bfloat16)
    hidden.requires_grad_()
    head.requires_grad_()
    weights = torch.linspace(-1, 2, 40)
    (target_log_probs(hidden, head, targets, softcap, chunk_logits=40)[0] * weights).sum().backward()
    exact = [part.detach().double().requires_grad_() for part in (hidden, head)]
    (whole(*exact, targets, softcap) * weights.double()).sum().backward()
    for ours, right in zip((hidden, head), exact, strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad.double() - right.grad).norm() <= 0.02 * right.grad.norm()
