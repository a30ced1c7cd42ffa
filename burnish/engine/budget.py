"""What of a micro-batch waits for the backward pass on the device, so that a run fits into the memory it may take.

All is closed forms: the bytes of each tensor, the seconds that computing it again would take, and a plan that keeps
what costs the most seconds per byte until the memory is full. A linear layer with K inputs takes 2 K operations for
each number that it gives, which is 2 bytes: K operations a byte. Attention over n keys takes 4 n operations for each
number, 2 n a byte, at a lower rate. What norms and the gated product give is never worth its bytes, and what down_proj
gives is not needed again.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import psutil
import torch

from burnish.model.families import DecoderConfig
from burnish.model.shelf import NAMES, Plan, buffer_bytes, keep_everything, keep_inputs
from burnish.ops.log_probs import CHUNK_LOGITS
from burnish.settings import memory_bytes

MATMUL_RATE = {2: 600e12, 4: 50e12, 8: 30e12}
"""Operations a second on Hopper, by the bytes of a number. Only how the rates compare with each other matters."""
FP8_RATE = 1200e12
ATTENTION_RATE = 400e12
LINK_RATE = 50e9
"""Bytes a second between pinned host memory and the device."""
BANDWIDTH = 3e12
"""Bytes a second of device memory."""
STORED_BYTES = {"nf4": 0.52, "bf16": 2.0, "fp32": 4.0, "full": 4.0, "full16": 2.0}
"""Of a number, by storage."""


class Work(NamedTuple):
    """The largest micro-batch of a run, and how it is computed."""

    tokens: int
    longest: int
    """Tokens of the longest sequence."""
    rank: int
    """Of the adapter, padded as it is multiplied with; 0: none."""
    itemsize: int
    """Bytes of an activation."""
    storage: str
    """A key of `model.storage.STORAGES`."""
    fp8: bool = False
    device: str = "cuda"
    """The type of the device: the head takes fewer rows at a time on a CPU."""
    passes: int = 1
    """Forward passes that wait at the same time for their backward passes."""


class Sizes(NamedTuple):
    """What a plan is made from: bytes and seconds of one pass over the largest micro-batch."""

    saved: Mapping[str, int]
    """Bytes of the tensors of a block that a plan decides over: `model.shelf.NAMES`."""
    seconds: Mapping[str, float]
    """To compute each of them again; all but x, a block's input."""
    small: int
    """Kept for each block in any case."""
    working: int
    """The most that a block's backward pass needs beside all of the block's own tensors."""
    head: int
    """The most that the head needs."""
    forward: float
    """Seconds of a block's forward pass: what copies to the host can hide under."""
    decoded: int
    """The weights of a block as they are multiplied with; 0 where they are stored so, or trained."""
    passes: int = 1


class Held(NamedTuple):
    """Bytes on the device that are not activations."""

    now: int
    """Weights, adapters and whatever else is there already."""
    to_come: int
    """Gradients and states of the optimizer that are not there yet."""


def sizes_of(config: DecoderConfig, work: Work) -> Sizes:
    """The bytes and seconds of one block and of the head, for decoders that are run by hand (`model/fused.py`)."""
    tokens, itemsize, hidden, inner = work.tokens, work.itemsize, config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    heads = queries + 2 * config.num_kv_heads * config.head_dim
    widths = {"x": hidden, "qkv": heads, "attention": queries, "x_mid": hidden, "gate_up": 2 * inner}
    saved = {name: tokens * width * itemsize for name, width in widths.items()}
    saved["attention"] += 4 * tokens * config.num_heads  # its log-sum-exp, in fp32
    other = work.fp8 or STORED_BYTES[work.storage] != itemsize
    multiplied = 1 if work.fp8 else itemsize
    decode = (STORED_BYTES[work.storage] + multiplied) / BANDWIDTH if other else 0.0
    rate = FP8_RATE if work.fp8 else MATMUL_RATE[itemsize]

    def linear(inputs: int, outputs: int) -> float:
        return inputs * outputs * (2 * tokens / rate + decode)

    seconds = {
        "attention": 4 * tokens * _mean_keys(config, work.longest) * queries / ATTENTION_RATE,
        "x_mid": linear(queries, hidden),
        "qkv": linear(hidden, heads),
        "gate_up": linear(hidden, 2 * inner),
    }
    factors = work.rank * (7 * hidden + heads + queries + 3 * inner)
    parameters = hidden * (heads + queries + 3 * inner)
    scratch = hidden * max(heads, 2 * inner) * multiplied if other else 0
    logits = min(tokens * config.vocab_size, CHUNK_LOGITS[work.device])
    return Sizes(
        saved=saved,
        seconds=seconds,
        small=2 * 4 * tokens + (7 * tokens * work.rank + factors) * itemsize,
        working=scratch + _working(saved, work),
        # The hidden states, those that are scored and the gradients of both; logits in fp32 and their gradient.
        head=4 * tokens * hidden * itemsize + logits * (4 + itemsize),
        forward=sum(seconds.values()) + linear(inner, hidden),
        decoded=parameters * (2 if work.fp8 else itemsize) if other and not work.storage.startswith("full") else 0,
        passes=work.passes,
    )


def plan_for(sizes: Sizes, num_blocks: int, memory: str, held: Held, device: torch.device) -> Plan:
    """The plan that `run.memory` asks for on this device, for the largest micro-batch; smaller ones use the same.

    An amount counts tensors, not what the CUDA driver itself takes, about half a GiB. Raises ValueError where not even
    the least fits. On a CPU, where no copy gains anything and the closed forms are rough, amounts are refused only if
    they do not hold the weights and what belongs to them.
    """
    cuda = device.type == "cuda"
    if memory == "auto" and not cuda:
        return keep_everything(num_blocks)
    amount = memory_bytes(memory)
    free = free_bytes(device) if cuda else psutil.virtual_memory().available
    host_room = psutil.virtual_memory().available // 2 if cuda else 0
    room = (free if amount is None else min(free, amount - held.now)) - held.to_come
    plan = make_plan(sizes, num_blocks, room, host_room, fill=memory != "least")
    if plan is None and (cuda or room <= 0):
        raise ValueError(_too_little(sizes, num_blocks, memory, held, free, host_room))
    return plan or keep_inputs(num_blocks)


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a CUDA device, less a margin: 3 % of its memory, at least 1 GiB."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused - max(2**30, total * 3 // 100)


def make_plan(sizes: Sizes, num_blocks: int, room: int, host_room: int, fill: bool = True) -> Plan | None:
    """The plan that keeps the most within `room` bytes of the device; None where not even the least fits.

    At the least, what is kept of a block is its input: on the host where its copies hide under the block's forward
    pass, or where the device has no room. The dearest of what else can hide there goes to the host as well, all within
    `host_room` bytes. With `fill` the room is then filled in one order for any room, so that more room never keeps
    less. Where everything is kept, weights stay decoded in as many blocks as fit.
    """
    names = _hidden(sizes)
    plan = _least(sizes, num_blocks, names, host_room)
    if peak_bytes(plan, sizes) > room and not names:
        plan = _least(sizes, num_blocks, ["x"], host_room)
    if peak_bytes(plan, sizes) > room:
        return None
    if not fill:
        return plan
    order = _dearest_first(sizes, plan, names)
    fitting = bisect_right(range(len(order) + 1), room, key=lambda count: peak_bytes(_with(plan, order[:count]), sizes))
    plan = _with(plan, order[: fitting - 1])
    if fitting <= len(order) or not sizes.decoded:
        return plan
    return Plan(plan.kept, plan.host, min(num_blocks, (room - peak_bytes(plan, sizes)) // sizes.decoded))


def peak_bytes(plan: Plan, sizes: Sizes) -> int:
    """The most bytes of activations and working memory at once: while the head runs, or the backward pass of a block.

    While a block runs, all of its own tensors are there, what is kept of those before it, and what of another one is on
    its way to the host or back.
    """
    kept = [sum(sizes.saved[name] for name in names) for names in plan.kept]
    away = [0, *(sum(sizes.saved[name] for name in names) for names in plan.host)]
    total, before = sum(kept), 0
    peak = total + away[-1] + sizes.head
    for block, own in enumerate(kept):
        peak = max(peak, before + away[block] + _at_work(sizes))
        before += own
    waiting = sizes.passes * len(kept) * sizes.small + (sizes.passes - 1) * total
    return peak + waiting + plan.dense_blocks * sizes.decoded


def _at_work(sizes: Sizes) -> int:
    """What the backward pass of one block takes, its own tensors among it."""
    return sum(sizes.saved.values()) + sizes.working


def _worth(sizes: Sizes, name: str) -> float:
    """Seconds per byte that keeping a tensor spares."""
    return sizes.seconds[name] / sizes.saved[name]


def _hidden(sizes: Sizes) -> list[str]:
    """What can go to the host while the block's forward pass hides its copies: x, then the dearest."""
    found, link = list[str](), sizes.forward * LINK_RATE
    for name in ["x", *sorted(sizes.seconds, key=lambda name: -_worth(sizes, name))]:
        if sizes.saved[name] <= link:
            found.append(name)
            link -= sizes.saved[name]
        elif name == "x":
            break
    return found


def _least(sizes: Sizes, num_blocks: int, names: Sequence[str], host_room: int) -> Plan:
    """These names go to the host, from the first block on, as far as it has room; otherwise only inputs are kept.

    The backward pass begins with the last block: nothing of it leaves.
    """
    host = [set[str]() for _ in range(num_blocks)]
    for name in names:
        size = sizes.passes * buffer_bytes(sizes.saved[name])
        count = min(num_blocks - 1, host_room // size)
        host_room -= count * size
        for block in range(count):
            host[block].add(name)
    kept = (frozenset({"x"} - names) for names in host)
    return Plan(tuple(kept), tuple(map(frozenset, host)))


def _dearest_first(sizes: Sizes, plan: Plan, hidden: Sequence[str]) -> list[tuple[int, str]]:
    """All that is not kept yet: copies that do not hide, then by worth, last what hides; from the last block on."""

    def worth(place: tuple[int, str]) -> float:
        block, name = place
        if name in plan.host[block]:
            return 0.0 if name in hidden else math.inf
        return _worth(sizes, name)

    places = [(block, name) for name in NAMES for block in reversed(range(len(plan.kept)))]
    return sorted((place for place in places if place[1] not in plan.kept[place[0]]), key=lambda place: -worth(place))


def _with(plan: Plan, places: Sequence[tuple[int, str]]) -> Plan:
    """The plan with these kept on the device as well."""
    kept, host = [set(names) for names in plan.kept], [set(names) for names in plan.host]
    for block, name in places:
        kept[block].add(name)
        host[block].discard(name)
    return Plan(tuple(map(frozenset, kept)), tuple(map(frozenset, host)))


def _mean_keys(config: DecoderConfig, longest: int) -> float:
    """How many keys a query of the longest sequence sees, on average over positions and layers."""
    windows = [longest if layer.window is None else min(layer.window, longest) for layer in config.layers]
    return sum(window - window**2 / (2 * longest) for window in windows) / len(windows)


def _working(saved: Mapping[str, int], work: Work) -> int:
    """What the two halves of a block's backward pass make beside its tensors, the greater of the two.

    Of the width of x: the gradients above and below the norm, what the norm gave, and the gradient of its sum.
    """
    x, heads, queries, gate_up = saved["x"], saved["qkv"], saved["attention"], saved["gate_up"]
    eighths = 1 / work.itemsize if work.fp8 else 0  # gradients once more, in 8 bits
    mlp = 4 * x + gate_up // 2 + (x + gate_up) * eighths
    # The gradients of q, k and v turned and not, and what the kernel sums up in fp32, where gate and up were.
    attention = 4 * x + 2 * heads + queries + queries * 4 // work.itemsize + (x + heads) * eighths - gate_up
    return math.ceil(max(mlp, attention))


def _too_little(sizes: Sizes, num_blocks: int, memory: str, held: Held, free: int, host_room: int) -> str:
    """One line: what takes how much, and what to write instead."""
    least = peak_bytes(_least(sizes, num_blocks, _hidden(sizes) or ["x"], host_room), sizes)
    work = max(_at_work(sizes), sizes.head)
    needed = held.now + held.to_come + least
    table = (
        f"weights and adapters {_gb(held.now)}, gradients and optimizer {_gb(held.to_come)}, activations at least "
        f"{_gb(least - work)}, workspace {_gb(_at_work(sizes))} in a block or {_gb(sizes.head)} in the head: "
        f"{_gb(needed)} in all"
    )
    if held.to_come + least <= free:
        return f"run.memory={memory} is too little: {table}; write run.memory={_gb(needed)} or {_LESS}"
    return f"run.memory={memory}: {_gb(held.now + free)} of this device can be used, too little: {table}; write {_LESS}"


def _gb(size: int) -> str:
    """Bytes as `run.memory` writes them, rounded up."""
    return f"{math.ceil(size / 1e8) / 10:.1f}GB"


_LESS = "a smaller run.microbatch_tokens"
