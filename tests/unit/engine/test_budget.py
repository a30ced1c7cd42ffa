"""Which activations a run keeps: closed forms against published sums, plans against what every plan must be."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.engine.budget import LINK_RATE, Sizes, Work, make_plan, peak_bytes, seconds_of, sizes_of
from burnish.engine.moments import Widths
from burnish.model.families import DecoderConfig, LayerConfig, parse_config
from burnish.model.shelf import NAMES, Plan, buffer_bytes, keep_everything, keep_inputs
from burnish.model.storage import STORAGES

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GB, PLENTY = 10**9, 10**15
TOKENS = 8192


def config(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 32000) -> DecoderConfig:
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }
    )


LLAMA_7B = config(4096, 11008, 32, 32, 32)
LLAMA_8B = config(4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = config(8192, 28672, 80, 64, 8, 128256)
NARROW = config(64, 128, 4, 4, 4, 256)


def work(tokens: int = TOKENS, longest: int = 2048, **changes: object) -> Work:
    return Work(tokens, longest, 16, 2, "nf4")._replace(**changes)


@pytest.mark.parametrize(("shape", "total"), [(LLAMA_7B, 24.4), (LLAMA_8B, 24.7), (LLAMA_70B, 121)])
def test_a_pass_without_recomputation_keeps_what_the_sums_on_paper_say(shape: DecoderConfig, total: float) -> None:
    """x, q, k, v, the attention's output, the stream after it, gate and up: 2 bytes each (performance notes, 6.5)."""
    kept = sum(sizes_of(shape, work()).saved.values()) * len(shape.layers)
    assert kept == pytest.approx(total * GB, rel=0.01)


@pytest.mark.parametrize("shape", [LLAMA_7B, LLAMA_8B, LLAMA_70B])
def test_seconds_are_operations_by_rates(shape: DecoderConfig) -> None:
    sizes = sizes_of(shape, work(storage="bf16"))
    head_dim = shape.hidden_size // shape.num_heads
    parameters = shape.hidden_size * (2 * shape.hidden_size + 2 * shape.num_kv_heads * head_dim)
    parameters += 3 * shape.hidden_size * shape.intermediate_size
    # On average a query of 2,048 sees 1,024 keys: q kᵀ and p v are 2 * 2 * 1024 operations for each channel.
    attention = 4 * 1024 * shape.hidden_size * TOKENS / 400e12
    assert sizes.forward == pytest.approx(2 * parameters * TOKENS / 600e12 + attention)
    for name in ("x_mid", "qkv", "gate_up"):  # K operations a byte, K = the width of the stream
        assert sizes.seconds[name] / sizes.saved[name] == pytest.approx(shape.hidden_size / 600e12)


def test_windows_shorten_what_a_query_sees() -> None:
    def seconds(window: int | None, longest: int) -> float:
        layers = (LayerConfig(window, 0), LayerConfig(None, 0))
        return sizes_of(dataclasses.replace(NARROW, layers=layers), work(longest=longest)).seconds["attention"]

    def counted(window: int | None, longest: int) -> float:
        return sum(min(t + 1, window or longest) for t in range(longest)) / longest

    base = seconds(None, 4096) / counted(None, 4096)
    for window, longest in ((512, 4096), (4096, 4096), (9999, 4096)):
        keys = (counted(window, longest) + counted(None, longest)) / 2
        assert seconds(window, longest) / keys == pytest.approx(base, rel=2e-3)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"storage": "bf16"}, "linears"),  # 4,096 operations a byte against 2,048 of attention, at two thirds the rate
        ({"storage": "bf16", "longest": 8192}, "attention"),
        ({"storage": "bf16", "fp8": True}, "attention"),  # linears take half the time, attention what it took
    ],
)
def test_the_dearest_per_byte_is_kept_first(changes: dict[str, object], first: str) -> None:
    sizes = sizes_of(LLAMA_7B, work(**changes))
    inputs = peak_bytes(keep_inputs(32), sizes)
    # Without a host, and with room for one kind of tensor in all blocks.
    plan = make_plan(sizes, 32, inputs + 32 * sizes.saved["attention"], host_room=0)
    assert plan is not None
    if first == "attention":
        assert all(first in names for names in plan.kept)
    else:
        assert not any("attention" in names for names in plan.kept)
        assert any(len(names) > 1 for names in plan.kept)


def test_at_the_least_inputs_and_what_hides_under_the_forward_pass_go_to_the_host() -> None:
    plan = make_plan(sizes_of(LLAMA_7B, work()), 32, PLENTY, PLENTY, fill=False)
    assert plan is not None
    # A block computes for 5.8 ms, in which 290 MB cross; x, attention and x_mid are 67 MB each, qkv and gate_up more.
    assert set(plan.host[:-1]) == {frozenset({"x", "x_mid", "attention"})}
    assert plan.host[-1] == frozenset()  # its backward pass begins at once: all of that stays
    assert set(plan.kept[:-1]) == {frozenset()}
    assert plan.kept[-1] == {"x", "x_mid", "attention"}


def test_the_embedding_goes_to_the_host_where_the_least_is_asked_for_or_nothing_else_fits() -> None:
    table = 32000 * 4096 * 2
    sizes = sizes_of(LLAMA_7B, work(embedding=table))
    least = make_plan(sizes, 32, PLENTY, PLENTY, fill=False)
    assert least is not None
    assert least.embedding_on_host
    assert peak_bytes(least, sizes) == peak_bytes(dataclasses.replace(least, embedding_on_host=False), sizes) - table
    everything = make_plan(sizes, 32, PLENTY, PLENTY)
    assert everything is not None
    assert not everything.embedding_on_host
    tight = make_plan(sizes, 32, peak_bytes(least, sizes), PLENTY)
    assert tight is not None
    assert tight.embedding_on_host


def test_an_mlp_goes_tile_by_tile_where_that_lowers_the_peak() -> None:
    """One sequence of 80k tokens: gate and up are 4.7 GB, and as much again with their gradients."""
    long = sizes_of(LLAMA_8B, work(tokens=81920, longest=81920))
    plan = make_plan(long, 32, PLENTY, PLENTY, fill=False)
    assert plan is not None
    assert plan.tile is not None
    whole = dataclasses.replace(plan, tile=None)
    assert peak_bytes(plan, long) < peak_bytes(whole, long) - 2 * long.saved["x"]
    trained = make_plan(sizes_of(LLAMA_8B, work(tokens=81920, storage="full16")), 32, PLENTY, PLENTY, fill=False)
    assert trained is not None
    assert trained.tile is None  # gradients of weights would be rounded tile by tile


def test_fp8_leaves_less_time_for_copies() -> None:
    plan = make_plan(sizes_of(LLAMA_7B, work(fp8=True)), 32, PLENTY, PLENTY, fill=False)
    assert plan is not None
    assert plan.host[0] == {"x", "attention"}  # 3.2 ms: 160 MB, two tensors of 67 MB


def test_inputs_stay_on_the_device_where_their_copies_would_hold_it_up() -> None:
    """With a narrow model a block computes for less time than its input takes to cross."""
    sizes = sizes_of(NARROW, work(storage="bf16"))
    plan = make_plan(sizes, 4, PLENTY, PLENTY, fill=False)
    assert plan == keep_inputs(4)
    forced = make_plan(sizes, 4, peak_bytes(keep_inputs(4), sizes) - 1, PLENTY)  # but not where they have no room
    assert forced is not None
    assert any(forced.host)


def test_the_host_takes_no_more_than_it_has_room_for() -> None:
    sizes = sizes_of(LLAMA_7B, work())
    for room in (0, 10**6, GB, 3 * GB, 10 * GB):
        plan = make_plan(sizes, 32, PLENTY, room, fill=False)
        assert plan is not None
        assert sum(buffer_bytes(sizes.saved[name]) for names in plan.host for name in names) <= room


def test_with_room_for_all_nothing_is_computed_again_and_then_weights_stay_decoded() -> None:
    sizes = sizes_of(LLAMA_7B, work())
    everything = peak_bytes(keep_everything(32), sizes)
    plan = make_plan(sizes, 32, everything, PLENTY)
    assert plan == keep_everything(32)
    plan = make_plan(sizes, 32, everything + 5 * 202_375_168 * 2 + 1, PLENTY)  # bf16 weights of 5 blocks
    assert plan is not None
    assert plan.dense_blocks == 5
    for storage, fp8, blocks in (("bf16", False, 0), ("full", False, 0), ("full16", False, 0), ("bf16", True, 32)):
        plan = make_plan(sizes_of(LLAMA_7B, work(storage=storage, fp8=fp8)), 32, PLENTY, PLENTY)
        assert plan is not None
        assert plan.dense_blocks == blocks


class Memory:
    """A device that counts: tensors by name, their bytes, and the most there ever was at once."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.peak = 0

    def take(self, **sizes: int) -> None:
        assert not self.held.keys() & sizes.keys()
        self.held |= sizes
        self.peak = max(self.peak, sum(self.held.values()))

    def free(self, *names: str) -> None:
        for name in names:
            del self.held[name]

    def need(self, **sizes: int) -> None:
        """For a moment."""
        self.take(**sizes)
        self.free(*sizes)


def walk(plan: Plan, sizes: Sizes) -> int:
    """The most bytes at once, from a walk through both passes: what `model/fused_pass.py` takes and lets go, in order.

    One pass, no tiles, no FP8 and no norms of heads.
    """
    memory, saved, last = Memory(), sizes.saved, len(plan.kept) - 1
    x, G = saved["x"], saved["gate_up"]

    def scratch(block: int) -> dict[str, int]:
        return dict.fromkeys(sizes.widths.weights, 0) if block < plan.dense_blocks else dict(sizes.widths.weights)

    for block in range(last + 1):
        weights, waiting = scratch(block), plan.kept[block] | plan.host[block]
        memory.take(**{f"{block}.{name}": saved[name] for name in waiting - {"x_mid", "gate_up"}})
        memory.take(**{f"{block}.x_mid": saved["x_mid"]})
        memory.take(h=x)
        memory.take(**{f"{block}.gate_up": G})
        memory.need(W=weights["gate_up"])
        memory.free("h")
        memory.take(gated=G // 2)
        if "gate_up" not in waiting:
            memory.free(f"{block}.gate_up")
        memory.need(W=weights["down"], y=x)
        memory.free("gated")
        if "x_mid" not in waiting:
            memory.free(f"{block}.x_mid")
        if block:
            memory.free(*(f"{block - 1}.{name}" for name in plan.host[block - 1]))
    memory.need(head=sizes.head)
    memory.take(above=x)
    for block in reversed(range(last + 1)):
        weights, kept, host = scratch(block), plan.kept[block], plan.host[block]
        here = {name for name in NAMES if f"{block}.{name}" in memory.held}

        def there(*names: str, block: int = block, here: set[str] = here) -> None:
            memory.take(**{f"{block}.{name}": saved[name] for name in names if name not in here})
            here.update(names)

        if "x_mid" not in kept | host:
            there("x", "qkv", "attention")
        there("x_mid")
        if "gate_up" not in kept | host:
            memory.take(h=x)
            there("gate_up")
            memory.need(W=weights["gate_up"])
            memory.free("h")
        memory.take(dh=G // 2)
        memory.need(W=weights["down"])
        memory.free("dh")
        there(*host & {"x", "qkv", "attention"})
        memory.take(dnormed=x)
        memory.need(W=weights["gate_up"])
        memory.free(f"{block}.gate_up")
        memory.need(product=x, dx=x)
        memory.free("dnormed", f"{block}.x_mid")
        if block:
            memory.take(**{f"{block - 1}.{name}": saved[name] for name in plan.host[block - 1]})
        there("x")
        if "qkv" not in here:
            memory.take(h=x)
            there("qkv")
            memory.need(W=weights["qkv"])
            memory.free("h")
        there("attention")
        memory.take(dout=saved["attention"])
        memory.need(W=weights["o"])
        memory.need(dqkv=saved["qkv"], sums=sizes.widths.sums)
        memory.free("dout", f"{block}.attention")
        memory.need(dqkv=saved["qkv"])
        memory.need(dh=x, W=weights["qkv"])
        memory.free(f"{block}.qkv")
        memory.need(dh=x, product=x, dx=x)
        memory.free(f"{block}.x")
    assert memory.held == {"above": x}
    return memory.peak


def some_sizes(draw: st.DrawFn) -> tuple[Sizes, int]:
    num = st.integers(1, 1000)
    saved = {name: draw(num) for name in NAMES}
    saved["x_mid"] = saved["x"]
    seconds = {name: draw(num) / 1000 for name in NAMES[1:]}
    forward = draw(st.integers(0, 4000)) / LINK_RATE
    weights = {name: draw(num) for name in ("qkv", "o", "gate_up", "down")}
    widths = Widths(saved, draw(num), weights)
    head = draw(st.integers(0, 5000))
    return Sizes(widths, seconds, draw(num), head, forward, draw(st.integers(0, 500))), draw(st.integers(1, 6))


cases = st.composite(some_sizes)()
rooms = st.integers(0, 40_000)


@settings(max_examples=150, deadline=None)
@given(case=cases, room=rooms, host_room=rooms)
def test_plans_keep_within_the_room_by_a_walk_through_both_passes(
    case: tuple[Sizes, int], room: int, host_room: int
) -> None:
    sizes, num_blocks = case
    plan = make_plan(sizes, num_blocks, room, host_room)
    if plan is None:
        return
    walked = walk(plan, sizes) + num_blocks * sizes.small + plan.dense_blocks * sizes.decoded
    estimate = peak_bytes(plan, sizes)
    assert walked <= estimate <= room
    host = max(sum(sizes.saved[name] for name in names) for names in plan.host)
    assert estimate <= walked + 2 * host + 3 * sizes.saved["x"] + sizes.saved["attention"]


@settings(max_examples=150, deadline=None)
@given(case=cases, room=rooms, more=rooms, host_room=rooms)
def test_more_room_never_costs_more(case: tuple[Sizes, int], room: int, more: int, host_room: int) -> None:
    sizes, num_blocks = case
    small, large = (make_plan(sizes, num_blocks, size, host_room) for size in (room, room + more))
    if small is None:
        return
    assert large is not None
    assert seconds_of(large, sizes) <= seconds_of(small, sizes)
    if large.kept == small.kept:
        assert small.dense_blocks <= large.dense_blocks


def recomputed(plan: Plan, num_blocks: int) -> set[tuple[int, str]]:
    return {(b, name) for b in range(num_blocks) for name in NAMES if name not in plan.kept[b] | plan.host[b]}


@settings(max_examples=150, deadline=None)
@given(case=cases, room=rooms)
def test_nothing_dearer_is_computed_again_than_what_is_kept(case: tuple[Sizes, int], room: int) -> None:
    sizes, num_blocks = case
    plan = make_plan(sizes, num_blocks, room, host_room=0)
    if plan is None:
        return
    worth = {name: sizes.seconds[name] / sizes.saved[name] for name in sizes.seconds}
    kept = [worth[name] for names in plan.kept for name in names if name != "x"]
    again = recomputed(plan, num_blocks)
    assert not kept or not again or min(kept) >= max(worth[name] for _, name in again)
    if again:  # nothing more of what is next in order fits
        block, name = max(again, key=lambda place: (worth[place[1]], -NAMES.index(place[1]), place[0]))
        more = list(plan.kept)
        more[block] = more[block] | {name}
        assert peak_bytes(Plan(tuple(more), plan.host), sizes) > room
    else:
        assert not sizes.decoded or plan.dense_blocks == num_blocks or peak_bytes(plan, sizes) + sizes.decoded > room


def test_every_storage_has_a_plan() -> None:
    """Of a model with windows in some layers, with and without 8 bits."""
    raw: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
    }
    raw |= {"num_hidden_layers": 6, "num_attention_heads": 4, "use_sliding_window": True, "max_window_layers": 3}
    shape = parse_config(raw)
    for storage in STORAGES:
        for itemsize, fp8 in ((2, False), (2, True), (4, False)):
            given = Work(512, 128, 16, itemsize, storage, fp8)
            plan = make_plan(sizes_of(shape, given), 6, PLENTY, PLENTY)
            assert plan is not None
            assert names_of(plan.kept) == set(NAMES)


def names_of(blocks: Sequence[frozenset[str]]) -> set[str]:
    return set().union(*blocks)
