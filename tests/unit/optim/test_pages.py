"""Paged AdamW: wherever its pages are, whenever they move, the bits are those of the unpaged one."""

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from burnish.engine.checkpoints import load_checkpoint, save_checkpoint
from burnish.optim.adamw import AdamW, adamw, optimizer_tensors, restore_optimizer, state_bytes
from burnish.optim.pages import CHUNK, Pages, cut

CPU = torch.device("cpu")
SHAPES = {"a": (3, 5), "b": (300, 250), "c": (129,), "d": (64, 64), "e": (5, 20000), "f": (4096,), "g": (2, 5)}
"""Less than a block, several chunks and a little, between; some of them keep fp32 states in any case."""
STEPS = 4
KINDS = list(itertools.product([torch.float32, torch.bfloat16], [False, True]))
kinds = pytest.mark.parametrize(("dtype", "eight"), KINDS)
PAGES = {False: 8 * CHUNK, True: 2 * CHUNK + 512}
"""Bytes of the smallest pages: a chunk of values in fp32, in 8 bits."""
Parameters = dict[str, nn.Parameter]
Meddle = Callable[[AdamW, int], None]
"""Does something to the optimizer at a point of a run: four of them in a step."""


def made(dtype: torch.dtype) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}
    return {name: nn.Parameter(tensor.to(dtype)) for name, tensor in drawn.items()}


def optimizer_of(parameters: Parameters, eight: bool, room: int | None = None, page: int | None = None) -> AdamW:
    groups = [
        {"params": [p for p in parameters.values() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim < 2]},
    ]
    return AdamW(groups, 1e-2, (0.9, 0.99), 1e-8, eight, 7, room, page or PAGES[eight])


def give_gradients(parameters: Parameters, step: int) -> None:
    """Added up over two micro-batches; in one step a parameter has none."""
    generator = torch.Generator().manual_seed(step)
    for name, p in parameters.items():
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        if (name, step) != ("b", 1):
            p.grad = gradient if p.grad is None else p.grad + gradient


def run(optimizer: AdamW, parameters: Parameters, steps: range, meddle: Meddle = lambda _, point: None) -> None:
    for step in steps:
        optimizer.zero_grad()
        meddle(optimizer, 4 * step)
        give_gradients(parameters, step)
        meddle(optimizer, 4 * step + 1)
        give_gradients(parameters, step)
        meddle(optimizer, 4 * step + 2)
        optimizer.clip(1.0)
        meddle(optimizer, 4 * step + 3)
        optimizer.step()


def tensors(optimizer: AdamW, parameters: Parameters) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in parameters.items()} | optimizer_tensors(optimizer, parameters)
    return {name: tensor.clone() for name, tensor in found.items()}


def expected(dtype: torch.dtype, eight: bool) -> dict[str, Tensor]:
    """Of a run with all states in one page for each kind of them: nothing is cut, and nothing moves."""
    if (dtype, eight) not in _FOUND:
        parameters = made(dtype)
        optimizer = optimizer_of(parameters, eight, page=2**30)
        run(optimizer, parameters, range(STEPS))
        assert optimizer.away() == 0
        _FOUND[dtype, eight] = tensors(optimizer, parameters)
    return _FOUND[dtype, eight]


_FOUND: dict[tuple[torch.dtype, bool], dict[str, Tensor]] = {}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert all(found[name].shape == wanted[name].shape and found[name].dtype == wanted[name].dtype for name in wanted)


@kinds
@pytest.mark.parametrize("room", [None, 6, 0])
def test_pages_on_the_device_or_on_the_host_make_no_difference(
    dtype: torch.dtype, eight: bool, room: int | None
) -> None:
    parameters = made(dtype)
    optimizer = optimizer_of(parameters, eight, None if room is None else room * PAGES[eight])
    run(optimizer, parameters, range(STEPS))
    assert (optimizer.away() > 0) == (room is not None)
    assert_same(tensors(optimizer, parameters), expected(dtype, eight))


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    page=st.sampled_from([CHUNK, 2 * CHUNK + 1000, 9 * CHUNK, 2**20]),
    room=st.none() | st.integers(0, 30 * CHUNK),
    moves=st.lists(st.tuples(st.integers(0, 4 * STEPS - 1), st.booleans(), st.integers(0, 30 * CHUNK)), max_size=8),
)
def test_whatever_moves_when(
    kind: tuple[torch.dtype, bool], page: int, room: int | None, moves: list[tuple[int, bool, int]]
) -> None:
    """Evictions and returns between steps, while gradients add up, and between the norm and the step."""

    def meddle(optimizer: AdamW, point: int) -> None:
        for when, out, size in moves:
            if when == point:
                before = optimizer.held()
                change = -optimizer.evict(size) if out else optimizer.restore(size)
                assert optimizer.held() - before == change or not out
                assert optimizer.held() <= before + (0 if out else size)

    parameters = made(kind[0])
    optimizer = optimizer_of(parameters, kind[1], room, page)
    run(optimizer, parameters, range(STEPS), meddle)
    assert_same(tensors(optimizer, parameters), expected(*kind))
    if room is not None and not moves:
        assert optimizer.held() <= max(room, 2 * max(page, PAGES[kind[1]]))


@kinds
def test_all_of_it_evicted_two_pages_are_left(dtype: torch.dtype, eight: bool) -> None:
    page = PAGES[eight]
    parameters = made(dtype)
    optimizer = optimizer_of(parameters, eight, page=page)
    run(optimizer, parameters, range(1))
    whole = optimizer.held()
    assert whole == state_bytes(optimizer) > 4 * page
    assert optimizer.to_lend() == 0
    freed = optimizer.evict(10**9)
    assert optimizer.to_lend() == 0  # what left has its memory there
    assert optimizer.held() == whole - freed <= 2 * page
    assert optimizer.away() == whole
    run(optimizer, parameters, range(1, 2))
    assert optimizer.held() == whole - freed
    assert optimizer.evict(1) == 0
    assert optimizer.restore(whole) == whole
    assert (optimizer.held(), optimizer.away()) == (whole, 0)


def test_what_is_asked_for_is_freed_and_no_more_than_needed() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(64, CHUNK))}
    optimizer = optimizer_of(parameters, False)
    parameters["w"].grad = torch.ones(64, CHUNK)
    optimizer.step()
    whole = optimizer.held()
    assert whole == 64 * PAGES[False]
    for size in (1, PAGES[False], 3 * PAGES[False] + 1, 20 * PAGES[False]):
        freed = optimizer.evict(size)
        assert size <= freed < size + PAGES[False]
        assert optimizer.restore(freed - 1) < freed + 2 * PAGES[False]
        assert optimizer.away()
        optimizer.restore(PAGES[False])
        assert optimizer.held() == whole


def test_too_few_pages_to_win_anything_stay() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(2, CHUNK))}
    optimizer = optimizer_of(parameters, False, room=0)
    parameters["w"].grad = torch.ones(2, CHUNK)
    optimizer.step()
    assert optimizer.evict(10**9) == 0
    assert (optimizer.held(), optimizer.away()) == (2 * PAGES[False], 0)


@kinds
@pytest.mark.parametrize("rooms", [(0, None), (None, 0), (5 * PAGES[False], 0)])
def test_checkpoints_are_the_same_and_continue_with_other_room(
    dtype: torch.dtype, eight: bool, rooms: tuple[int | None, int | None], tmp_path: Path
) -> None:
    first, second = made(dtype), made(dtype)
    page = PAGES[eight]
    optimizer = optimizer_of(first, eight, rooms[0], page)
    run(optimizer, first, range(2))
    groups = {"weights": first, "optimizer": optimizer_tensors(optimizer, first)}
    save_checkpoint(tmp_path / "step-2", groups, {})
    stored, _ = load_checkpoint(tmp_path / "step-2")
    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(stored["weights"][name])
    resumed = optimizer_of(second, eight, rooms[1], 2 * page)
    restore_optimizer(resumed, second, stored["optimizer"])
    run(resumed, second, range(2, STEPS))
    assert (resumed.away() > 0) == (rooms[1] == 0)
    assert_same(tensors(resumed, second), expected(dtype, eight))


@pytest.mark.parametrize("room", [None, 0])
def test_states_that_are_put_back_replace_later_ones_even_by_none(room: int | None) -> None:
    parameters = made(torch.float32)
    optimizer = optimizer_of(parameters, False, room)
    begin = {name: p.detach().clone() for name, p in parameters.items()}
    run(optimizer, parameters, range(2))
    restore_optimizer(optimizer, parameters, {})
    assert optimizer_tensors(optimizer, parameters) == {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(begin[name])
    run(optimizer, parameters, range(STEPS))
    assert_same(tensors(optimizer, parameters), expected(torch.float32, False))


@kinds
@pytest.mark.parametrize("room", [None, 0])
def test_gradients_taken_as_they_appear_give_the_same_bits(dtype: torch.dtype, eight: bool, room: int | None) -> None:
    """A first pass for the norm, a second one for the steps; no gradient outlives its turn."""
    parameters = made(dtype)
    optimizer = optimizer_of(parameters, eight, room, CHUNK)
    reference = made(dtype)
    other = optimizer_of(reference, eight, page=2**30)
    for step in range(STEPS):
        for _ in range(2):
            give_gradients(reference, step)
        norm = other.clip(1.0)
        other.step()
        other.zero_grad()
        for take in (optimizer.measure_one, optimizer.step_one):
            for _ in range(2):
                give_gradients(parameters, step)
            for parameter in reversed(parameters.values()):
                if parameter.grad is not None:
                    take(parameter)
                    assert (parameter.grad is None) == (take == optimizer.step_one)
                    parameter.grad = None
            if take == optimizer.measure_one:
                assert torch.equal(optimizer.clip(1.0), norm)
        optimizer.zero_grad()
    assert_same(tensors(optimizer, parameters), expected(dtype, eight))
    assert_same(tensors(other, reference), expected(dtype, eight))


def test_taken_one_by_one_with_the_norm_of_the_step_before() -> None:
    """The first step is not clipped; the second one is, with the norm of the first."""
    ours, theirs = made(torch.float32), made(torch.float32)
    optimizer, other = optimizer_of(ours, False), optimizer_of(theirs, False)
    norm = torch.ones(())
    for step in range(2, 4):
        for parameters in (ours, theirs):
            give_gradients(parameters, step)
        for parameter in theirs.values():
            parameter.grad = parameter.grad * ((1.0 / (norm + 1e-6)).clamp(max=1.0) if step == 3 else 1.0)
        other.step()
        other.zero_grad()
        for parameter in ours.values():
            optimizer.measure_one(parameter)
            optimizer.step_one(parameter)
        norm = optimizer.clip(1.0)
        assert norm > 10
    assert_same(tensors(optimizer, ours), tensors(other, theirs))


class Small(Pages):
    """A device of so many bytes."""

    capacity = 0

    def _on_device(self, size: int) -> Tensor:
        live: dict[int, int] = self.__dict__.setdefault("live", {})  # whoever holds it
        if sum(live.values()) + size > self.capacity:
            raise torch.OutOfMemoryError("full")
        page = super()._on_device(size)
        storage = page.untyped_storage()
        live[storage._cdata] = size
        weakref.finalize(storage, live.pop, storage._cdata, None)
        return page


@kinds
@pytest.mark.parametrize("capacity", [2, 3, 4, 9])
def test_states_for_which_the_device_has_no_room_are_made_on_the_host(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, eight: bool, capacity: int
) -> None:
    monkeypatch.setattr("burnish.optim.adamw.Pages", Small)
    page = PAGES[eight]
    monkeypatch.setattr(Small, "capacity", capacity * page)
    parameters = made(dtype)
    optimizer = optimizer_of(parameters, eight, page=page)
    run(optimizer, parameters, range(1))
    assert optimizer.away() > 0
    assert optimizer.held() > (capacity - 2) * page
    optimizer.restore(10**9)  # there is less than is said
    run(optimizer, parameters, range(1, STEPS))
    assert optimizer.away() > 0
    assert_same(tensors(optimizer, parameters), expected(dtype, eight))


@kinds
@pytest.mark.parametrize("capacity", [2, 3, 4, 6, 9])
def test_states_of_a_run_are_read_again_where_the_device_has_no_room_for_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, eight: bool, capacity: int
) -> None:
    wanted, first = expected(dtype, eight), made(dtype)
    optimizer = optimizer_of(first, eight)
    run(optimizer, first, range(2))
    stored = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, first).items()}
    monkeypatch.setattr("burnish.optim.adamw.Pages", Small)
    monkeypatch.setattr(Small, "capacity", capacity * PAGES[eight])
    resumed = optimizer_of(first, eight, page=PAGES[eight])
    restore_optimizer(resumed, first, stored)
    assert resumed.away() > 0
    run(resumed, first, range(2, STEPS))
    assert_same(tensors(resumed, first), wanted)


class Scarce(Small):
    """And a host that has room for so many bytes of pages, pinned: beyond them CUDA says so in words alone."""

    host = 0

    def _on_host(self, size: int) -> Tensor:
        given: list[weakref.ref[Tensor]] = self.__dict__.setdefault("given", [])
        if sum(page.nbytes for ref in given if (page := ref()) is not None) + size > self.host:
            raise RuntimeError("CUDA error: out of memory")
        page = super()._on_host(size)
        given.append(weakref.ref(page))
        return page


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> type[Scarce]:
    monkeypatch.setattr("burnish.optim.adamw.Pages", Scarce)
    monkeypatch.setattr(Scarce, "capacity", 2**40)
    monkeypatch.setattr(Scarce, "host", 2**40)
    return Scarce


@kinds
@pytest.mark.parametrize("host", [0, 1, 2, 3, 5])
def test_where_the_host_has_room_for_a_few_pages_a_few_leave(
    scarce: type[Scarce], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, eight: bool, host: int
) -> None:
    parameters, page = made(dtype), PAGES[eight]
    optimizer = optimizer_of(parameters, eight, page=page)
    run(optimizer, parameters, range(1))
    whole = optimizer.held()
    monkeypatch.setattr(scarce, "host", host * page)
    freed = optimizer.evict(10**9)
    assert optimizer.held() == whole - freed
    assert optimizer.away() <= host * page
    assert (freed > 0) == (optimizer.away() > 0)  # none leaves for nothing
    if host == 5:
        assert freed > 0
    run(optimizer, parameters, range(1, 2))
    assert optimizer.held() == whole - freed
    assert (optimizer.restore(whole) > 0) == (freed > 0)
    assert (optimizer.held(), optimizer.away()) == (whole, 0)
    run(optimizer, parameters, range(2, STEPS))
    assert_same(tensors(optimizer, parameters), expected(dtype, eight))


def test_states_that_have_no_room_anywhere_are_told_in_a_line(
    scarce: type[Scarce], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when there is room again, nothing is lost."""
    parameters, page = made(torch.bfloat16), PAGES[False]
    optimizer = optimizer_of(parameters, False)
    monkeypatch.setattr(scarce, "capacity", 4 * page)
    monkeypatch.setattr(scarce, "host", 4 * page)
    with pytest.raises(MemoryError) as told:
        run(optimizer, parameters, range(1))
    assert str(told.value).startswith("out of memory: the host has none for 0 MiB more of the optimizer's states, of ")
    assert "optim.kind=adamw8bit" in str(told.value)
    assert optimizer.held() <= 4 * page
    monkeypatch.setattr(scarce, "host", 2**40)
    run(optimizer, parameters, range(STEPS))
    assert_same(tensors(optimizer, parameters), expected(torch.bfloat16, False))


def test_other_errors_of_the_host_are_not_taken_for_a_lack_of_room(
    scarce: type[Scarce], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Pages, size: int) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    parameters = made(torch.float32)
    optimizer = optimizer_of(parameters, False)
    run(optimizer, parameters, range(1))
    monkeypatch.setattr(scarce, "_on_host", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        optimizer.evict(10**9)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    room=st.none() | st.integers(0, 30 * CHUNK),
    moves=st.lists(
        st.tuples(st.integers(0, 4 * STEPS - 1), st.booleans(), *(st.integers(0, 30 * CHUNK) | st.just(2**40),) * 3),
        max_size=8,
    ),
)
def test_whatever_runs_out_when_no_bit_changes(
    kind: tuple[torch.dtype, bool], room: int | None, moves: list[tuple[int, bool, int, int, int]]
) -> None:
    """Moves for which host and device, once all states are made, have as much room as they happen to have."""

    def meddle(optimizer: AdamW, point: int) -> None:
        for when, out, size, device, host in moves:
            if when == point and point > 3:
                before = optimizer.held()
                Scarce.capacity, Scarce.host = before + device, optimizer.away() + host
                change = -optimizer.evict(size) if out else optimizer.restore(size)
                Scarce.capacity = Scarce.host = 2**40
                assert optimizer.held() - before == change or not out
                assert change <= 0 or not out
                assert optimizer.held() <= before + device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("burnish.optim.adamw.Pages", Scarce)
        Scarce.capacity = Scarce.host = 2**40
        parameters = made(kind[0])
        optimizer = optimizer_of(parameters, kind[1], room)
        run(optimizer, parameters, range(STEPS), meddle)
        assert_same(tensors(optimizer, parameters), expected(*kind))


def test_room_from_the_start_is_kept_to_at_all_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.optim.adamw.Pages", Small)
    monkeypatch.setattr(Small, "capacity", 4 * PAGES[False])  # beyond it there is no memory to be had
    parameters = made(torch.bfloat16)
    optimizer = optimizer_of(parameters, False, 4 * PAGES[False])
    monkeypatch.setattr(Small, "_leave", None)
    run(optimizer, parameters, range(STEPS))
    assert_same(tensors(optimizer, parameters), expected(torch.bfloat16, False))


def test_a_room_makes_pages_of_what_torch_would_do_otherwise() -> None:
    arguments = (1e-2, (0.9, 0.99), 1e-8, 0.1)
    assert isinstance(adamw(made(torch.float32), *arguments), torch.optim.AdamW)
    assert isinstance(adamw(made(torch.float32), *arguments, room=0), AdamW)


@given(
    counts=st.lists(st.integers(1, 10 * CHUNK), min_size=1, max_size=8),
    eight=st.booleans(),
    page=st.integers(1, 30 * CHUNK),
)
def test_pieces_cover_every_value_once_and_do_not_overlap(counts: list[int], eight: bool, page: int) -> None:
    pieces, sizes = cut(counts, eight, page, 5)
    taken = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    least = 2 * CHUNK * (1 if eight else 4) + (2 * CHUNK // 256 * 4 if eight else 0)
    assert max(sizes) <= max(page, least)
    for count, own in zip(counts, pieces, strict=True):
        assert [piece.first for piece in own] == [0, *(piece.last for piece in own[:-1])]
        assert own[-1].last == count
        assert all(piece.first % CHUNK == 0 for piece in own)
        for piece in own:
            for moment in piece.moments(taken[piece.page - 5], eight).values():
                assert moment.data_ptr() % 16 == 0
                bytes_ = moment.view(torch.uint8)
                assert not bytes_.any()
                bytes_.fill_(1)
