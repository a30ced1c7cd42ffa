"""AdamW's kernels, compiled: against the reference on the CPU bit for bit, over many tensors and very large ones."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from burnish.engine.learner import Learner, NonFinite
from burnish.engine.mesh import Mesh
from burnish.optim import adamw as module
from burnish.optim.adamw import AdamW, adamw, optimizer_tensors, restore_optimizer
from tests.tiny import tiny_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Triton warns about its own insides
]
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1
SHAPES = [(16, 4096), (3,), (1000, 333), (1,), (4096,), (64, 65)]
KINDS = list(itertools.product([torch.float32, torch.bfloat16], ["adamw", "adamw8bit"]))
kinds = pytest.mark.parametrize(("dtype", "kind"), KINDS)
Parameters = dict[str, nn.Parameter]


@pytest.fixture(autouse=True)
def triton() -> None:
    pytest.importorskip("triton")


def made(dtype: torch.dtype, device: str = "cuda") -> Parameters:
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(shape, generator=generator) * 0.1).to(dtype) for shape in SHAPES]
    return {str(i): nn.Parameter(tensor.to(device)) for i, tensor in enumerate(drawn)}


def optimizer_of(parameters: Parameters, kind: str) -> AdamW:
    groups = [
        {"params": [p for p in parameters.values() if p.ndim == 2], "weight_decay": DECAY},
        {"params": [p for p in parameters.values() if p.ndim < 2]},
    ]
    return AdamW(groups, LR, BETAS, EPS, kind == "adamw8bit", 7 + 2**33)


def give_gradients(parameters: Parameters, step: int) -> None:
    """Gradients over many powers of ten, so that every level of the 8-bit maps is met."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters.values():
        size = 10 ** (2 * torch.randn(p.shape, generator=generator) - 3)
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(p.device, p.dtype)


def tensors(optimizer: AdamW, parameters: Parameters) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in parameters.items()} | optimizer_tensors(optimizer, parameters)
    return {name: tensor.cpu() for name, tensor in found.items()}


@kinds
def test_steps_equal_the_reference_on_the_cpu_bit_for_bit(dtype: torch.dtype, kind: str) -> None:
    found: list[dict[str, Tensor]] = []
    for device in ("cpu", "cuda"):
        parameters = made(dtype, device)
        optimizer = optimizer_of(parameters, kind)
        for step in range(4):
            give_gradients(parameters, step)
            if step == 2:
                parameters["2"].grad = None
            optimizer.step()
            optimizer.zero_grad()
        found.append(tensors(optimizer, parameters))
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


@kinds
def test_without_triton_the_results_are_the_same(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Tensor]] = []
    for kernel in (True, False):
        monkeypatch.setattr(module, "takes_kernel", lambda tensor, kernel=kernel: kernel)
        parameters = made(dtype)
        optimizer = optimizer_of(parameters, kind)
        for step in range(2):
            give_gradients(parameters, step)
            optimizer.step()
        found.append(tensors(optimizer, parameters))
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


def test_addresses_that_are_not_multiples_of_16() -> None:
    straight, skewed = made(torch.bfloat16), made(torch.bfloat16)
    for p in skewed.values():
        p.data = torch.cat([p.data.flatten()[:1], p.data.flatten()])[1:].view(p.shape)
    for parameters in (straight, skewed):
        optimizer = optimizer_of(parameters, "adamw8bit")
        give_gradients(parameters, 0)
        optimizer.step()
    assert all(torch.equal(straight[name], skewed[name]) for name in straight)


def test_clipped_steps_are_those_of_torch() -> None:
    ours, theirs = made(torch.float32), made(torch.float32)
    first = adamw(ours, LR, BETAS, EPS, DECAY)
    assert isinstance(first, AdamW)
    groups = [{"params": list(group["params"]), "weight_decay": group["weight_decay"]} for group in first.param_groups]
    places = {p: name for name, p in ours.items()}
    groups = [group | {"params": [theirs[places[p]] for p in group["params"]]} for group in groups]
    second = torch.optim.AdamW(groups, LR, BETAS, EPS, fused=True)
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        expected = nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        torch.testing.assert_close(first.clip(1.0), expected, rtol=1e-5, atol=0)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-5)


@kinds
def test_restored_it_continues_bit_for_bit(dtype: torch.dtype, kind: str) -> None:
    whole, parted = made(dtype), made(dtype)
    first, second = optimizer_of(whole, kind), optimizer_of(parted, kind)
    for step in range(4):
        if step == 2:
            stored = tensors(second, parted)
            second = optimizer_of(parted, kind)
            restore_optimizer(second, parted, stored)
        for parameters, optimizer in ((whole, first), (parted, second)):
            give_gradients(parameters, step)
            optimizer.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
    ours, expected = tensors(second, parted), tensors(first, whole)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    table = nn.Parameter(torch.randn(320, 320, device="cuda"))
    parameters = {"table": table}
    learner = Learner(parameters, adamw(parameters, LR, BETAS, EPS, 0.0), lambda step: LR, 1.0, Mesh(table.device))
    batch = tiny_batch([5, 9]).to(table.device)

    def objective(batch, factor=1.0):
        log_probs = table.log_softmax(-1)[batch.tokens, batch.targets]
        return -(log_probs * batch.weights).sum() * factor, {}

    learner.step([batch], objective, lambda batch: batch.total_weight)
    before = tensors(learner.optimizer, parameters)
    with pytest.raises(NonFinite):
        learner.step([batch], lambda batch: objective(batch, float("inf")), lambda batch: batch.total_weight)
    after = tensors(learner.optimizer, parameters)
    for name in ("table", "table.exp_avg", "table.exp_avg_sq"):
        assert torch.equal(before[name], after[name])


def test_places_beyond_two_to_the_31st() -> None:
    """A tensor of more values than 32 bits can number: its last values move as those of a small one do."""
    count, last = 2**31 + 4096, 4096
    large = {"w": nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device="cuda").view(-1, 4096))}
    small = {"w": nn.Parameter(torch.zeros(last, dtype=torch.bfloat16, device="cuda").view(-1, 4096))}
    for parameters in (large, small):
        optimizer = optimizer_of(parameters, "adamw8bit")
        parameters["w"].grad = torch.zeros_like(parameters["w"])
        parameters["w"].grad.view(-1)[-last:] = torch.linspace(-1, 1, last, device="cuda").bfloat16()
        norm = optimizer.clip(0.0)
        optimizer.step()
        torch.testing.assert_close(norm, parameters["w"].grad.view(-1)[-last:].float().norm(), rtol=1e-5, atol=0)
        state = optimizer.tensors_of(parameters["w"])
        parameters["codes"] = state["state1"].view(-1)[-last:].clone()
    # The two round by chance with other random numbers: neighbours in bf16 at most.
    torch.testing.assert_close(large["w"].view(-1)[-last:], small["w"].view(-1), rtol=2**-7, atol=1e-6)
    assert not large["w"].view(-1)[: 2**31].any()
    assert torch.equal(
        large["codes"].cpu(), small["codes"].cpu()
    )  # those of several pages are put together on the host


def test_many_tensors_are_moved_by_one_launch() -> None:
    """448 tensors of a LoRA: each of them moves as it does alone."""
    generator = torch.Generator("cuda").manual_seed(0)
    starts = [torch.randn(16, 1024, generator=generator, device="cuda") for _ in range(448)]
    grads = [torch.randn(16, 1024, generator=generator, device="cuda") for _ in range(448)]

    def moved(chosen: list[int]) -> list[torch.Tensor]:
        parameters = {str(i): nn.Parameter(starts[i].clone()) for i in chosen}
        optimizer = adamw(parameters, LR, BETAS, EPS, 0.0)
        assert isinstance(optimizer, AdamW)
        for i in chosen:
            parameters[str(i)].grad = grads[i].clone()
        optimizer.clip(0.0)
        optimizer.step()
        assert len(optimizer.launches()) == 1
        return [p.detach() for p in parameters.values()]

    together = moved(list(range(448)))
    for i in (0, 100, 447):
        assert not torch.equal(together[i], starts[i])
        assert torch.equal(together[i], moved([i])[0])
