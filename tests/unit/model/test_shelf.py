"""Activations between forward and backward: kept, sent to the host and back, or dropped."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from burnish.model.shelf import NAMES, HostMemory, Plan, Shelf, keep_everything, keep_inputs

CPU = torch.device("cpu")
BLOCKS = 5


def all_on_host(num_blocks: int = BLOCKS) -> Plan:
    return Plan((frozenset[str](),) * num_blocks, (frozenset(NAMES),) * num_blocks)


def tensors(block: int, name: str) -> tuple[Tensor, ...]:
    """What a block leaves under a name: two tensors of which one is too small to travel."""
    generator = torch.Generator().manual_seed(10 * block + NAMES.index(name))
    return torch.randn(20, 16, generator=generator), torch.randn(3, generator=generator)


def fill(shelf: Shelf, num_blocks: int = BLOCKS) -> None:
    for block in range(num_blocks):
        for name in NAMES:
            shelf.put(block, name, tensors(block, name))
        shelf.put(block, "rstd", (torch.full((20,), float(block)),))


def check(shelf: Shelf, num_blocks: int = BLOCKS) -> None:
    """Go through the blocks backwards as a trunk does; everything that was put is there once."""
    for block in reversed(range(num_blocks)):
        shelf.prefetch(block - 1)
        for name in NAMES:
            got = shelf.get(block, name)
            assert (got is not None) == (name in shelf.plan.kept[block] | shelf.plan.host[block])
            if got is not None:
                assert all(torch.equal(a, b) for a, b in zip(got, tensors(block, name), strict=True))
                assert name == "x" or shelf.get(block, name) is None
        (rstd,) = shelf.get(block, "rstd") or ()
        assert torch.equal(rstd, torch.full((20,), float(block)))


def mixed() -> Plan:
    kept = [{"x", "qkv"}, {"attention"}, set(NAMES), {"x"}, {"x_mid", "gate_up"}]
    host = [{"gate_up"}, {"x"}, set[str](), {"qkv", "x_mid"}, {"x"}]
    return Plan(tuple(map(frozenset, kept)), tuple(map(frozenset, host)))


@pytest.mark.parametrize("plan", [keep_everything(BLOCKS), keep_inputs(BLOCKS), all_on_host(), mixed()])
def test_what_was_put_comes_back_once_bit_for_bit_and_the_rest_is_to_be_computed_again(plan: Plan) -> None:
    shelf = Shelf(plan, HostMemory(CPU))
    fill(shelf)
    check(shelf)


def test_taking_an_input_twice_is_an_error_and_not_a_wish_to_compute_it_again() -> None:
    for plan in (keep_everything(1), all_on_host(1)):
        shelf = Shelf(plan, HostMemory(CPU))
        fill(shelf, 1)
        assert shelf.get(0, "x") is not None
        with pytest.raises(AssertionError, match="second backward"):
            shelf.get(0, "x")


def test_a_plan_says_where_each_input_is() -> None:
    with pytest.raises(AssertionError):
        Plan((frozenset({"qkv"}),), (frozenset({"attention"}),))
    with pytest.raises(AssertionError):
        Plan((frozenset({"x"}),), (frozenset({"x"}),))


def test_memory_is_let_go_when_dropped_taken_or_on_the_host() -> None:
    shelf = Shelf(mixed(), HostMemory(CPU))
    alive: dict[tuple[int, str], weakref.ref[Tensor]] = {}
    for block in range(BLOCKS):
        for name in NAMES:
            parts = tensors(block, name)
            alive[block, name] = weakref.ref(parts[0])
            shelf.put(block, name, parts)
            del parts
    held = {place for place, tensor in alive.items() if tensor() is not None}
    waiting = {(4, "x")}  # the last block's: its copy may be on the way
    assert held == {(block, name) for block in range(BLOCKS) for name in shelf.plan.kept[block]} | waiting
    shelf.get(2, "gate_up")
    assert alive[2, "gate_up"]() is None


def test_host_memory_is_allocated_in_the_first_step_and_used_again() -> None:
    memory = HostMemory(CPU)
    for _ in range(3):
        shelf = Shelf(all_on_host(), memory)
        fill(shelf)
        check(shelf)
        assert memory.total == BLOCKS * len(NAMES) * 2048  # 20 * 16 floats are 1,280 bytes


def test_micro_batches_of_nearly_one_size_share_buffers() -> None:
    memory = HostMemory(CPU)
    for rows in (1000, 600, 1024, 513):
        shelf = Shelf(all_on_host(1), memory)
        x = torch.randn(rows, 8)
        shelf.put(0, "x", (x,))
        shelf.put(0, "x_mid", (torch.zeros(2, 8),))
        (got,) = shelf.get(0, "x") or ()
        assert torch.equal(got, x)
        assert memory.total == 1024 * 8 * 4


def test_two_passes_at_once_do_not_disturb_each_other() -> None:
    memory = HostMemory(CPU)
    first, second = Shelf(all_on_host(), memory), Shelf(mixed(), memory)
    fill(first)
    fill(second)
    check(second)
    third = Shelf(all_on_host(), memory)
    fill(third)
    check(first)
    check(third)


def test_a_pass_that_fails_gives_its_buffers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(CPU)
    fill(Shelf(all_on_host(), memory))
    gc.collect()
    total, take = memory.total, memory.take
    shelf = Shelf(all_on_host(), memory)
    shelf.put(0, "x", tensors(0, "x"))
    monkeypatch.setattr(memory, "take", lambda size: pytest.fail("no memory"))
    with pytest.raises(pytest.fail.Exception):
        shelf.put(1, "x", tensors(1, "x"))
    monkeypatch.setattr(memory, "take", take)
    shelf.prefetch(0)
    del shelf
    gc.collect()
    again = Shelf(all_on_host(), memory)
    fill(again)
    assert memory.total == total
    check(again)


def test_strides_and_dtypes_survive_and_gaps_are_closed() -> None:
    shelf = Shelf(all_on_host(3), HostMemory(CPU))
    turned = torch.randn(2, 64, 8).transpose(0, 1)
    gaps = torch.randn(64, 40)[:, 8:24]
    eighths = torch.randn(64, 32).to(torch.float8_e4m3fn)
    wide = torch.randn(64, 4, dtype=torch.float64)
    for block in range(3):  # the first has left the device when the last one comes
        shelf.put(block, "attention", (turned, gaps, eighths.view(torch.uint8).view(torch.float8_e4m3fn), wide))
    a, b, c, d = shelf.get(0, "attention") or ()
    assert torch.equal(a, turned)
    assert a.stride() == turned.stride()
    assert torch.equal(b, gaps)
    assert b.is_contiguous()
    assert c.dtype == torch.float8_e4m3fn
    assert torch.equal(c.view(torch.uint8), eighths.view(torch.uint8))
    assert torch.equal(d, wide)
