"""AdamW's kernels in Triton's interpreter against the reference, bit for bit."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from burnish.optim import adamw as module
from burnish.optim import eight_bit
from burnish.optim.adamw import AdamW, optimizer_tensors
from burnish.optim.pages import PAGE

pytest.importorskip("triton")

SHAPES = [(4, 3), (3,), (64, 65), (1,), (129, 128)]  # less than a block, several, a chunk and a little
KINDS = list(itertools.product([torch.float32, torch.bfloat16], [False, True]))
kinds = pytest.mark.parametrize(("dtype", "eight"), KINDS)


def made(dtype: torch.dtype, eight: bool, room: int | None = None, page: int = PAGE) -> AdamW:
    generator = torch.Generator().manual_seed(0)
    drawn = [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in SHAPES]
    groups = [
        {"params": [p for p in drawn if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in drawn if p.ndim < 2]},
    ]
    return AdamW(groups, 1e-2, (0.9, 0.99), 1e-8, eight, 7 + 2**33, room, page)


def weights(optimizer: AdamW) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(optimizer: AdamW, step: int) -> None:
    """Gradients over many powers of ten, so that every level of the 8-bit maps is met."""
    generator = torch.Generator().manual_seed(step)
    for p in weights(optimizer):
        size = 10 ** (2 * torch.randn(p.shape, generator=generator) - 3)
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(p.dtype)


def tensors(optimizer: AdamW) -> dict[str, Tensor]:
    named = {str(i): p for i, p in enumerate(weights(optimizer))}
    return {name: p.detach() for name, p in named.items()} | optimizer_tensors(optimizer, named)


def both(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, eight: bool, work: Callable[[AdamW], None]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the reference and the kernel make of the same work."""
    found: list[dict[str, Tensor]] = []
    for kernel in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(module, "takes_kernel", lambda tensor, kernel=kernel: kernel)
            optimizer = made(dtype, eight)
            work(optimizer)
            found.append(tensors(optimizer))
    return found[0], found[1]


def assert_equal(found: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    reference, kernel = found
    assert reference.keys() == kernel.keys()
    assert all(torch.equal(reference[name], kernel[name]) for name in reference)


@kinds
def test_steps_equal_the_reference_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, eight: bool
) -> None:
    def work(optimizer: AdamW) -> None:
        for step in range(2):
            give_gradients(optimizer, step)
            optimizer.step()
            optimizer.zero_grad()

    assert_equal(both(monkeypatch, dtype, eight, work))


def test_missing_gradients_leave_tensors_and_their_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(optimizer: AdamW) -> None:
        for step in range(3):
            give_gradients(optimizer, step)
            weights(optimizer)[1 + step % 2].grad = None
            optimizer.step()

    assert_equal(both(monkeypatch, torch.bfloat16, True, work))


def test_gradients_may_lie_anyhow(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(optimizer: AdamW) -> None:
        give_gradients(optimizer, 0)
        for p in weights(optimizer):
            wide = torch.zeros((*p.shape, 2), dtype=p.dtype)
            wide[..., 1] = p.grad
            p.grad = wide[..., 1]
        optimizer.step()

    assert_equal(both(monkeypatch, torch.float32, False, work))


def test_addresses_that_are_not_multiples_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "takes_kernel", lambda tensor: True)

    straight, skewed = made(torch.bfloat16, False), made(torch.bfloat16, False)
    for p in weights(skewed):
        p.data = torch.cat([p.data.flatten()[:1], p.data.flatten()])[1:].view(p.shape)
    for optimizer in (straight, skewed):
        give_gradients(optimizer, 0)
        optimizer.step()
    assert weights(skewed)[0].data_ptr() % 16
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(skewed), strict=True))


@kinds
def test_one_that_is_measured_and_taken_at_once_is_left_alone_unless_it_is_finite(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, eight: bool
) -> None:
    """The others are taken, with the bits of the whole step, and the norm of all is known afterwards."""
    monkeypatch.setattr(module, "takes_kernel", lambda tensor: True)
    yes, no = torch.tensor(True), torch.tensor(False)
    whole, single, before = (made(dtype, eight) for _ in range(3))
    for optimizer in (whole, single):
        give_gradients(optimizer, 0)
    norm = whole.clip(0)
    whole.step()
    for p in reversed(weights(single)):
        single.take_one(p, yes)
        assert p.grad is None
    assert torch.equal(single.clip(0), norm)
    assert_equal((tensors(whole), tensors(single)))
    for spoilt, healthy in ((0, yes), (None, no)):
        one = made(dtype, eight)
        give_gradients(one, 0)
        for number, p in enumerate(weights(one)):
            if number == spoilt:
                p.grad.view(-1)[-1] = torch.inf
            one.take_one(p, healthy)
            fresh = weights(before)[number]
            assert torch.equal(p, fresh if number == spoilt or not healthy else weights(whole)[number])
        assert bool(one.clip(0).isfinite()) == (spoilt is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_exact_and_clips_in_the_step(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "takes_kernel", lambda tensor: True)
    clipped, scaled = made(dtype, False), made(dtype, False)
    give_gradients(clipped, 0)
    give_gradients(scaled, 0)
    expected = sum(p.grad.double().square().sum() for p in weights(clipped)).sqrt()
    norm = clipped.clip(1e-3)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    clipped.step()
    monkeypatch.setattr(scaled, "_scale", (1e-3 / (norm + 1e-6)).clone())
    scaled.step()
    assert_equal((tensors(scaled), tensors(clipped)))
    first = tensors(clipped)["0.exp_avg"].double() / 0.1
    torch.testing.assert_close(first, weights(clipped)[0].grad.double() * 1e-3 / expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_two_look_ups_find_every_level(signed: bool) -> None:
    """Around every midpoint between levels, one float to either side."""
    cpu = torch.device("cpu")
    levels = eight_bit.signed_map(cpu) if signed else eight_bit.unsigned_map(cpu)
    levels = levels[levels >= 0]
    middles = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([levels, *(torch.nextafter(middles, torch.tensor(x)) for x in (0.0, 1.0)), middles])
    table = eight_bit.search(cpu, signed)
    bucket = ((values.view(torch.int32) >> 16) - eight_bit.LOWEST).clamp(min=0)
    guess = table.guess[bucket].int()
    assert torch.equal(guess + (values > table.middles[guess]).int(), torch.bucketize(values, middles).int())
    edges = torch.cat([torch.zeros(1), ((torch.arange(1, 2945) + eight_bit.LOWEST).int() << 16).view(torch.float32)])
    assert torch.bucketize(edges, middles).diff().max() == 1  # no bucket has two midpoints


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors have several."""
    for name in ("burnish.kernels.adam._CHUNK", "burnish.optim.pages.CHUNK", "burnish.optim.bundle.CHUNK"):
        monkeypatch.setattr(name, 2048)


@pytest.mark.usefixtures("small_chunks")
@kinds
def test_pages_anywhere_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, eight: bool) -> None:
    """Pages of one chunk, on the device or on the host, and moved between the norm and the step."""

    def work(optimizer: AdamW) -> None:
        for step in range(3):
            give_gradients(optimizer, step)
            if step == 1:
                weights(optimizer)[0].grad = None
            norms.append(optimizer.clip(1.0))
            if room == 0 and step == 1:
                optimizer.restore(10**9)
            elif room == 0:
                optimizer.evict(10**9)
            optimizer.step()
            assert (optimizer.away() > 0) == (room == 0 and step != 1)
            optimizer.zero_grad()

    monkeypatch.setattr(module, "takes_kernel", lambda tensor: True)
    found: list[dict[str, Tensor]] = []
    norms: list[Tensor] = []
    for room in (None, 0):
        optimizer = made(dtype, eight, room, 5000)
        work(optimizer)
        found.append(tensors(optimizer))
    assert_equal((found[0], found[1]))
    assert torch.equal(torch.stack(norms[:3]), torch.stack(norms[3:]))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("room", [None, 0])
def test_gradients_taken_one_by_one_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, room: int | None) -> None:
    monkeypatch.setattr(module, "takes_kernel", lambda tensor: True)
    whole, parted = made(torch.bfloat16, True), made(torch.bfloat16, True, room, 5000)
    for step in range(2):
        give_gradients(whole, step)
        if step == 1:
            weights(whole)[2].grad = None
        norm = whole.clip(1.0)
        whole.step()
        for take in (parted.measure_one, parted.step_one):
            give_gradients(parted, step)
            for p, other in reversed(list(zip(weights(parted), weights(whole), strict=True))):
                if other.grad is not None:
                    take(p)
                p.grad = None
            if take == parted.measure_one:
                assert torch.equal(parted.clip(1.0), norm)
    assert (parted.away() > 0) == (room == 0)
    assert_equal((tensors(whole), tensors(parted)))
