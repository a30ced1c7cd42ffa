"""Activations that travel between device and host on a stream of their own, and the peak that a plan foretells."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from burnish.engine.budget import Sizes, Work, make_plan, peak_bytes, sizes_of
from burnish.engine.moments import Widths
from burnish.model.adapters import AdapterSpec, add_adapter
from burnish.model.checkpoint import init_model
from burnish.model.shelf import NAMES, HostMemory, Plan, Shelf
from tests.tiny import tiny_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
CUDA = torch.device("cuda")
BLOCKS, NUMBERS = 6, 1 << 22
HOST = Plan((frozenset[str](),) * BLOCKS, (frozenset({"x", "x_mid"}),) * BLOCKS)


def made(block: int, name: str) -> Tensor:
    """16 MiB that are written late: a copy that did not wait for them would find something else."""
    x = torch.empty(NUMBERS, device=CUDA)
    torch.cuda._sleep(200_000)
    return x.copy_(torch.arange(NUMBERS, device=CUDA, dtype=torch.float32).add_(1000.0 * block + len(name)))


def spoil() -> None:
    """Write over what is free: whoever still reads from it or writes to it shows."""
    free = [torch.empty(NUMBERS, device=CUDA) for _ in range(4)]
    for x in free:
        x.fill_(float("nan"))


def forward(shelf: Shelf) -> None:
    for block in range(BLOCKS):
        for name in ("x", "x_mid"):
            shelf.put(block, name, (made(block, name), torch.full((3,), float(block), device=CUDA)))
        spoil()


def backward(shelf: Shelf, blocks: range = range(BLOCKS)) -> Tensor:
    """How far what comes back, and is used a moment later, is from what was put."""
    wrong = torch.zeros((), device=CUDA)
    for block in reversed(blocks):
        shelf.prefetch(block - 1)
        spoil()
        for name in ("x_mid", "x"):
            got, small = shelf.get(block, name) or ()
            torch.cuda._sleep(200_000)
            error = (got - made(block, name)).abs().max() + (small - block).abs().max()
            wrong = torch.maximum(wrong, error.nan_to_num(nan=1e9))
            del got
            spoil()
    return wrong


def test_tensors_come_back_whole_while_all_free_memory_is_written_over() -> None:
    memory, held = HostMemory(CUDA), None
    for _ in range(3):
        first, second = Shelf(HOST, memory), Shelf(HOST, memory)
        forward(first)
        forward(second)
        assert backward(second).item() == 0
        assert backward(first).item() == 0
        assert held in (None, memory.total)  # allocated in the first step alone
        held = memory.total
    assert held == 2 * BLOCKS * 2 * 4 * NUMBERS


def test_a_pass_that_fails_with_copies_on_the_way_spoils_no_other() -> None:
    memory = HostMemory(CUDA)
    forward(Shelf(HOST, memory))
    total = memory.total
    shelf = Shelf(HOST, memory)
    forward(shelf)
    backward(shelf, range(4, BLOCKS))
    shelf.prefetch(2)
    other = Shelf(HOST, memory)
    del shelf
    gc.collect()
    spoil()
    forward(other)
    assert backward(other).item() == 0
    assert memory.total <= total + 4 * 4 * NUMBERS


def test_copies_run_beside_the_computation() -> None:
    memory = HostMemory(CUDA)
    forward(warm := Shelf(HOST, memory))
    backward(warm)
    torch.cuda.synchronize()
    shelf, computing = Shelf(HOST, memory), torch.cuda.current_stream()
    shelf.put(0, "x", (torch.ones(NUMBERS, device=CUDA),))
    torch.cuda._sleep(2_000_000_000)  # a second: far longer than 16 MiB take to cross
    assert memory.stream is not None
    memory.stream.synchronize()
    assert not computing.query()


def held_in(shelf: Shelf, sizes: Sizes, num_blocks: int) -> int:
    """The measured peak of a pass whose tensors have these sizes, with blocks that need what a trunk's need."""

    def memory(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=CUDA)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for block in range(num_blocks):
        own = {name: memory(size) for name, size in sizes.saved.items()}
        for name in NAMES:
            shelf.put(block, name, (own.pop(name),))
    memory(sizes.head)
    for block in reversed(range(num_blocks)):
        mlp = {name: shelf.get(block, name) or (memory(sizes.saved[name]),) for name in ("x_mid", "gate_up")}
        memory(sizes.saved["gate_up"] // 2)
        del mlp
        shelf.prefetch(block - 1)
        attention = {name: shelf.get(block, name) or (memory(sizes.saved[name]),) for name in ("x", "qkv", "attention")}
        memory(sizes.saved["qkv"] + sizes.saved["attention"])
        del attention
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("host_room", [0, 1 << 40])
def test_the_peak_is_the_one_that_the_plan_was_made_for(share: float, host_room: int) -> None:
    mib = 1 << 20
    saved = {"x": 8 * mib, "qkv": 16 * mib, "attention": 8 * mib, "x_mid": 8 * mib, "gate_up": 32 * mib}
    seconds = {"qkv": 3.0, "attention": 2.0, "x_mid": 1.0, "gate_up": 5.0}
    widths = Widths(saved, sums=0, weights=dict.fromkeys(("qkv", "o", "gate_up", "down"), 0))
    sizes = Sizes(widths, seconds, small=0, head=40 * mib, forward=17 * mib / 50e9, decoded=0)
    room = 200 * mib + int(share * 12 * 72 * mib)
    plan = make_plan(sizes, 12, room, host_room)
    assert plan is not None
    assert any(plan.host) == (host_room > 0 and share < 1)
    for _ in range(2):
        peak = held_in(Shelf(plan, HostMemory(CUDA)), sizes, 12)
    estimate = peak_bytes(plan, sizes)
    host = max(sum(saved[name] for name in names) for names in plan.host)
    assert estimate - 2 * host - sum(saved.values()) <= peak <= estimate <= room


SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
TOKENS = 8192


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("memory", ["everything", "half", "least"])
def test_a_training_step_peaks_where_the_estimate_says(tmp_path: Path, memory: str, fp8: bool) -> None:
    """At most 10 % and 64 MiB (the libraries' workspaces) above it, and not far below."""
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a device that multiplies in 8 bits")
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    model = init_model(tmp_path, 0, "nf4", CUDA, torch.bfloat16)
    add_adapter(model, "a", AdapterSpec(rank=16), torch.Generator().manual_seed(0))
    assert model.fuse_blocks(fp8)
    sizes = sizes_of(model.config, Work(TOKENS, 2048, 16, 2, "nf4", fp8))
    blocks = len(model.config.layers)
    everything, least = (make_plan(sizes, blocks, 1 << 50, 1 << 40, fill=fill) for fill in (True, False))
    assert everything is not None
    assert least is not None
    everything = Plan(everything.kept, everything.host)  # without decoded weights
    room = (peak_bytes(everything, sizes) + peak_bytes(least, sizes)) // 2
    plan = {"everything": everything, "half": make_plan(sizes, blocks, room, 1 << 40), "least": least}[memory]
    assert plan is not None
    model.plan = plan
    batch = tiny_batch([2048] * (TOKENS // 2048), vocab_size=8000).to(CUDA)
    for _ in range(2):  # libraries and working copies take their memory in the first step
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.score(batch, "a").log_probs.sum().backward()
        peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    estimate = peak_bytes(plan, sizes) + gradients
    print(f"{memory}, fp8={fp8}: measured {peak / 2**20:.0f} MiB, estimated {estimate / 2**20:.0f} MiB")
    assert peak <= 1.02 * estimate
    assert peak >= 0.5 * estimate
