"""AdamW's pages on a GPU: the bits of the unpaged one, the memory that is left to others, and what the copies cost."""

import itertools
import time
from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from burnish.optim.adamw import AdamW, optimizer_tensors, restore_optimizer
from burnish.optim.pages import CHUNK, PAGE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Triton warns about its own insides
]
DEVICE = "cuda"
SHAPES = [(16, 4096), (3,), (1000, 3333), (1,), (4096,), (64, 65), (300, 4096)]
PAGES = {False: 40 * CHUNK, True: 10 * CHUNK + 5 * 512}
"""Bytes of pages for five chunks: a hundred of them, copied while others are."""
KINDS = list(itertools.product([torch.float32, torch.bfloat16], [False, True]))
kinds = pytest.mark.parametrize(("dtype", "eight"), KINDS)
Parameters = dict[str, nn.Parameter]
MIB = 2**20


@pytest.fixture(autouse=True)
def triton() -> None:
    pytest.importorskip("triton")


def made(dtype: torch.dtype) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    drawn = [(torch.randn(shape, generator=generator) * 0.1).to(dtype) for shape in SHAPES]
    return {str(i): nn.Parameter(tensor.to(DEVICE)) for i, tensor in enumerate(drawn)}


def optimizer_of(parameters: Parameters, eight: bool, room: int | None = None, page: int = PAGE) -> AdamW:
    groups = [
        {"params": [p for p in parameters.values() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim < 2]},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, 1e-2, (0.9, 0.99), 1e-8, eight, 7, room, page)


def give_gradients(parameters: Parameters, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def run(optimizer: AdamW, parameters: Parameters, steps: range, moving: bool = False) -> None:
    for step in steps:
        if moving and step % 3 == 0:
            optimizer.restore(10**9 if step % 2 else 20 * PAGES[True])
        give_gradients(parameters, step)
        if moving and step % 3 == 1:
            optimizer.evict(10**9 if step % 2 else 20 * PAGES[True])
        optimizer.clip(1.0)
        if moving and step % 3 == 2:
            optimizer.evict(10 * PAGES[True])
        optimizer.step(healthy=torch.tensor(True, device=DEVICE))
        optimizer.zero_grad()


def tensors(optimizer: AdamW, parameters: Parameters) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in parameters.items()} | optimizer_tensors(optimizer, parameters)
    return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


@kinds
@pytest.mark.parametrize(("room", "moving"), [(None, False), (0, False), (30 * PAGES[True], False), (None, True)])
def test_paged_unpaged_and_resumed_have_the_same_bits(
    dtype: torch.dtype, eight: bool, room: int | None, moving: bool
) -> None:
    """All with the device busy, so that no copy is done before it must be."""
    whole, paged = made(dtype), made(dtype)
    first, second = optimizer_of(whole, eight), optimizer_of(paged, eight, room, PAGES[eight])
    busy = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(20):
        busy = busy @ busy / 4096
    run(first, whole, range(8))
    run(second, paged, range(4), moving)
    if room is not None:
        assert second.away() > 0
    stored = tensors(second, paged)
    second = optimizer_of(paged, eight, None if room == 0 else 0, PAGES[eight])
    restore_optimizer(second, paged, stored)
    run(second, paged, range(4, 8), moving)
    assert differing(tensors(second, paged), tensors(first, whole)) == []


@kinds
@pytest.mark.parametrize("room", [None, 0])
def test_gradients_taken_one_by_one_give_the_same_bits(dtype: torch.dtype, eight: bool, room: int | None) -> None:
    whole, parted = made(dtype), made(dtype)
    first, second = optimizer_of(whole, eight), optimizer_of(parted, eight, room, PAGES[eight])
    for step in range(4):
        give_gradients(whole, step)
        norm = first.clip(1.0)
        first.step()
        for take in (second.measure_one, second.step_one):
            give_gradients(parted, step)
            for parameter in reversed(parted.values()):
                take(parameter)
                parameter.grad = None
            if take == second.measure_one:
                assert torch.equal(second.clip(1.0), norm)
    assert differing(tensors(second, parted), tensors(first, whole)) == []


def big(room: int | None = None, eight: bool = False) -> tuple[nn.Parameter, AdamW]:
    """128M values: 1 GiB of fp32 states, 32 pages."""
    weight = nn.Parameter(torch.zeros(32, 2**22, device=DEVICE, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    return weight, optimizer_of({"w": weight}, eight, room)


@pytest.mark.parametrize("eight", [False, True])
def test_all_of_it_evicted_needs_two_pages_of_the_device(eight: bool) -> None:
    torch.cuda.empty_cache()
    kept, optimizer = big(0, eight)
    optimizer.step()  # tables and levels are there now
    before = torch.cuda.memory_allocated() - optimizer.held()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.clip(1.0)
        optimizer.step()
    assert 0 < optimizer.held() <= 2 * PAGE
    assert torch.cuda.max_memory_allocated() - before <= 2 * PAGE + MIB
    assert optimizer.away() >= kept.numel() * (2 if eight else 8)


def test_moved_pages_leave_their_memory_to_others() -> None:
    torch.cuda.empty_cache()
    _, optimizer = big()
    optimizer.step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    freed = optimizer.evict(2**30)
    assert freed == 2**30 - 2 * PAGE
    assert torch.cuda.memory_allocated() == before - freed
    assert torch.cuda.max_memory_allocated() == before
    assert optimizer.restore(freed) == 2**30
    assert torch.cuda.memory_allocated() == before


@contextmanager
def only(room: int) -> Generator[None]:
    """No more of the device than is in use and so many bytes."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_spike_evicts_and_all_comes_back() -> None:
    weight, optimizer = big()
    other, unpaged = big()
    for one in (optimizer, unpaged):
        one.step()
    with only(100 * MIB):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(600 * MIB, dtype=torch.uint8, device=DEVICE)
        assert optimizer.evict(500 * MIB) >= 500 * MIB
        spike = torch.full((600 * MIB,), 255, dtype=torch.uint8, device=DEVICE)
        for one in (optimizer, unpaged):
            one.clip(1.0)
            one.step()
        del spike
        assert optimizer.away() > 500 * MIB
        optimizer.restore(600 * MIB)
        assert optimizer.away() == 0
    for one in (optimizer, unpaged):
        one.step()
    assert torch.equal(weight, other)


def test_states_without_room_are_made_on_the_host() -> None:
    weight, optimizer = big()
    with only(300 * MIB):
        optimizer.step()
        assert 2 * PAGE <= optimizer.held() <= 300 * MIB
        assert optimizer.restore(2**40) < 2**30  # there is less than is said
        optimizer.step()
    other, unpaged = big()
    unpaged.step()
    unpaged.step()
    assert torch.equal(weight, other)


@pytest.mark.parametrize("eight", [False, True])
def test_what_the_copies_cost(eight: bool) -> None:
    """Printed: in and out overlap, where a step over 1 GiB takes little more than 1 GiB one way at the link's rate."""
    weight, optimizer = big(eight=eight)
    spent: list[tuple[float, float]] = []
    for evicted in (False, True):
        if evicted:
            optimizer.evict(2**40)
        for _ in range(3):
            optimizer.step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            optimizer.step()
        asked = time.perf_counter()
        torch.cuda.synchronize()
        spent.append(((asked - began) / 5, (time.perf_counter() - began) / 5))
    here = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    there = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    rates: list[float] = []
    for to, source in ((here, there), (there, here), (here, there)):
        torch.cuda.synchronize()
        began = time.perf_counter()
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(2**30 / (time.perf_counter() - began) / 1e9)
    away = optimizer.away()
    for (host, step), name in zip(spent, ("on the device", "evicted"), strict=True):
        print(
            f"{'8 bits' if eight else 'fp32'} {name}: {1e3 * step:.2f} ms a step, the host's part {1e3 * host:.2f} ms"
        )
    print(
        f"{away / 2**20:.0f} MiB each way, {away / spent[1][1] / 1e9:.1f} GB/s each way at once; the link alone: ",
        rates,
    )
    assert away >= weight.numel() * 2


@pytest.mark.parametrize("room", [None, 0])
def test_the_host_is_soon_done_with_one_parameter(room: int | None) -> None:
    """Printed: the time that the host takes for each of 64 weights whose gradients are taken as they appear."""
    parameters = {str(i): nn.Parameter(torch.zeros(2048, 2048, device=DEVICE).bfloat16()) for i in range(64)}
    optimizer = optimizer_of(parameters, True, room)
    for _ in range(3):
        for p in parameters.values():
            p.grad = torch.zeros_like(p)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for p in reversed(parameters.values()):
            optimizer.step_one(p)
        spent = (time.perf_counter() - began) / len(parameters)
        torch.cuda.synchronize()
        whole = (time.perf_counter() - began) / len(parameters)
    print(f"room {room}: {1e6 * spent:.0f} us of the host for each, {1e6 * whole:.0f} us until all was done")
    assert all(not p.any() and p.grad is None for p in parameters.values())
