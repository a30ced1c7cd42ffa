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
from dataclasses import replace
from typing import NamedTuple

from burnish.engine.moments import Widths, backward_peak, forward_peak
from burnish.model.families import DecoderConfig
from burnish.model.shelf import NAMES, Plan, buffer_bytes
from burnish.ops.log_probs import CHUNK_LOGITS

MATMUL_RATE = {2: 600e12, 4: 50e12, 8: 30e12}
"""Operations a second on Hopper, by the bytes of a number. Only how the rates compare with each other matters."""
FP8_RATE = 1200e12
ATTENTION_RATE = 400e12
LINK_RATE = 50e9
"""Bytes a second between pinned host memory and the device."""
BANDWIDTH = 3e12
"""Bytes a second of device memory."""
SMALLEST_TILE = 2048
"""Tokens of an MLP's tile: fewer leave multiprocessors without work."""
NEARLY = 1.15
"""So much more than the least may be taken for speed where the least is asked for: a copy beside the computation."""
TILED = 0.1
"""What tiles cost of the seconds of the MLP's matmuls."""
TINY = 1e-3
"""What a copy that hides costs of its seconds: enough to prefer none."""
GATE_RANK = 64
"""Beyond it LoRA around the gate is multiplied by cuBLAS, into a copy of gate and up (`kernels/gate.py`)."""
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
    embedding: int = 0
    """Bytes of the embedding, where it may lie on the host."""
    keys: int = 0
    """Keys that are read, where prompts are shared: a prompt's once for each sequence; 0 where none is."""
    a_step: int = 1
    """Micro-batches of an optimizer step."""


class Sizes(NamedTuple):
    """What a plan is made from: bytes and seconds of one pass over the largest micro-batch."""

    widths: Widths
    """Of what passes through a block; a plan decides over those that are named in `model.shelf.NAMES`."""
    seconds: Mapping[str, float]
    """To compute each of them again; all but x, a block's input."""
    small: int
    """Kept for each block in any case."""
    head: int
    """The most that the head needs."""
    forward: float
    """Seconds of a block's forward pass: what copies to the host can hide under."""
    decoded: int
    """The weights of a block as they are multiplied with; 0 where they are stored so, or trained."""
    tokens: int = 0
    embedding: int = 0
    """Of the embedding, where it may lie on the host: frozen, and not the head as well."""
    a_step: int = 1
    """Passes of an optimizer step."""

    @property
    def saved(self) -> Mapping[str, int]:
        """Bytes of the tensors that a plan decides over."""
        return self.widths.saved


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
    logits = min(tokens * config.vocab_size, CHUNK_LOGITS[work.device])
    trains = work.storage.startswith("full")
    joints = {"qkv": hidden * heads, "o": queries * hidden, "gate_up": 2 * hidden * inner, "down": hidden * inner}
    return Sizes(
        widths=Widths(
            saved=saved,
            sums=4 * tokens * queries,
            weights={name: count * multiplied if other else 0 for name, count in joints.items()},
            eighths=1 / itemsize if work.fp8 else 0.0,
            copied=_copied(config, work),
            clones=work.rank > GATE_RANK,
            turned=0 if config.qk_norm == "none" else saved["qkv"] - tokens * (heads - queries) // 2 * itemsize,
            own=round(joints["gate_up"] * STORED_BYTES[work.storage]) if trains else 0,
        ),
        seconds=seconds,
        small=2 * 4 * tokens + (7 * tokens * work.rank + factors) * itemsize,
        # The hidden states, those that are scored and the gradients of both; logits in fp32 and their gradient.
        head=4 * tokens * hidden * itemsize + logits * (4 + itemsize),
        forward=sum(seconds.values()) + linear(inner, hidden),
        decoded=parameters * (2 if work.fp8 else itemsize) if other and not trains else 0,
        tokens=tokens,
        embedding=work.embedding,
        a_step=work.a_step,
    )


def make_plan(sizes: Sizes, num_blocks: int, room: int, host_room: int, fill: bool = True) -> Plan | None:
    """The plan that costs the fewest seconds within `room` bytes of the device; None where not even the least fits.

    At the least, what is kept of a block is its input: on the host where its copies hide under the block's forward
    pass, or where the device has no room. The dearest of what else can hide there may go to the host as well, all
    within `host_room` bytes; MLPs may run over some tokens at a time, and the embedding be on the host. With `fill` the
    room is then filled in one order for any room; without it, of the plans that take nearly the least the fastest is
    taken. Where everything is kept, weights stay decoded in as many blocks as fit.
    """
    plans = [plan for plan in _beginnings(sizes, num_blocks, host_room) if peak_bytes(plan, sizes) <= room]
    if fill:
        plans = [_filled(plan, sizes, room) for plan in plans]
    elif plans:
        least = min(peak_bytes(plan, sizes) for plan in plans)
        plans = [plan for plan in plans if peak_bytes(plan, sizes) <= least * NEARLY]
    return min(plans, key=lambda plan: seconds_of(plan, sizes), default=None)


def leanest(sizes: Sizes, num_blocks: int, host_room: int) -> Plan:
    """The plan that takes the least."""
    return min(_beginnings(sizes, num_blocks, host_room), key=lambda plan: peak_bytes(plan, sizes))


def _beginnings(sizes: Sizes, num_blocks: int, host_room: int) -> list[Plan]:
    """Plans that keep no more than inputs on the device."""
    names = _hidden(sizes)
    choices = [names[: count + 1] for count in range(len(names))] or [[], ["x"]]
    return [_least(sizes, num_blocks, chosen, host_room, tight) for chosen in choices for tight in (False, True)]


def _filled(plan: Plan, sizes: Sizes, room: int) -> Plan:
    """The plan with as much kept on the device as its room allows, then with weights decoded."""
    order = _dearest_first(sizes, plan)
    fitting = bisect_right(range(len(order) + 1), room, key=lambda count: peak_bytes(_with(plan, order[:count]), sizes))
    plan = _with(plan, order[: max(0, fitting - 1)])
    if fitting <= len(order) or not sizes.decoded:
        return plan
    decoded = (replace(plan, dense_blocks=count) for count in range(len(plan.kept), 0, -1))
    return next((more for more in decoded if peak_bytes(more, sizes) <= room), plan)


def peak_bytes(plan: Plan, sizes: Sizes) -> int:
    """The most bytes of activations and working memory at once: while the head runs, or a block on its way back.

    While a block runs, what it computes with is there, what is kept of those before it, and what of another one is on
    its way to the host or back.
    """
    kept = [sum(sizes.saved[name] for name in names) for names in plan.kept]
    total, before = sum(kept), 0
    peak = total + _away(plan, sizes)[-1] + sizes.head
    for own, at_work in zip(kept, block_peaks(plan, sizes), strict=True):
        peak = max(peak, before + at_work)
        before += own
    small = len(kept) * sizes.small
    aside = sizes.embedding if plan.embedding_on_host else 0
    return peak + small + plan.dense_blocks * sizes.decoded - aside


def block_peaks(plan: Plan, sizes: Sizes) -> list[int]:
    """The most that each block holds at work, forward or backward."""
    share, away = _share(plan, sizes), _away(plan, sizes)
    seen: dict[tuple[frozenset[str], frozenset[str], int, bool], int] = {}  # most blocks are alike
    peaks: list[int] = []
    for block, (kept, host) in enumerate(zip(plan.kept, plan.host, strict=True)):
        key = kept, host, away[block], block < plan.dense_blocks
        if key not in seen:
            back = backward_peak(sizes.widths, kept, host, *key[2:], share)
            seen[key] = max(back, forward_peak(sizes.widths, kept | host, *key[2:], share))
        peaks.append(seen[key])
    return peaks


def _away(plan: Plan, sizes: Sizes) -> list[int]:
    """What of the block before each, and of the last one, is on its way to the host or back."""
    return [0, *(sum(sizes.saved[name] for name in names) for names in plan.host)]


def _share(plan: Plan, sizes: Sizes) -> float:
    """The part of the tokens that an MLP takes at a time."""
    return 1.0 if plan.tile is None else min(1.0, plan.tile / sizes.tokens)


def seconds_of(plan: Plan, sizes: Sizes) -> float:
    """What the plan costs: what is computed again, tiles that fill the device less well, rows over the bus."""
    again = 0.0
    for kept, host in zip(plan.kept, plan.host, strict=True):
        again += sum(spent for name, spent in sizes.seconds.items() if name not in kept | host)
        if plan.tile is not None and "gate_up" not in kept | host:
            again += TILED * 3 * sizes.seconds["gate_up"]
        again += sum(TINY * sizes.saved[name] / LINK_RATE for name in host)
    if plan.embedding_on_host:
        again += 2 * sizes.saved["x"] / LINK_RATE
    return again


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


def _least(sizes: Sizes, num_blocks: int, names: Sequence[str], host_room: int, tight: bool) -> Plan:
    """These names go to the host, from the first block on, as far as it has room; otherwise only inputs are kept.

    The backward pass begins with the last block: what others send to the host stays on the device there.
    """
    host = [set[str]() for _ in range(num_blocks)]
    for name in names:
        size = buffer_bytes(sizes.saved[name])
        count = min(num_blocks - 1, host_room // size)
        host_room -= count * size
        for block in range(count):
            host[block].add(name)
    kept = [frozenset({"x"} - names) for names in host]
    kept[-1] |= host[0]
    plan = Plan(tuple(kept), tuple(map(frozenset, host)))
    if not tight:
        return plan
    tiles = [sizes.tokens >> halvings for halvings in range(1, 8) if sizes.tokens >> halvings >= SMALLEST_TILE]
    best = plan
    for tile in tiles if not sizes.widths.own else []:
        tiled = replace(plan, tile=tile)
        if peak_bytes(tiled, sizes) < peak_bytes(best, sizes):
            best = tiled
    return replace(best, embedding_on_host=sizes.embedding > 0)


def _dearest_first(sizes: Sizes, plan: Plan) -> list[tuple[int, str]]:
    """All that is not kept yet: copies that do not hide, then by worth, last what hides; from the last block on."""
    hidden = _hidden(sizes)

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
    return replace(plan, kept=tuple(map(frozenset, kept)), host=tuple(map(frozenset, host)))


def _copied(config: DecoderConfig, work: Work) -> tuple[int, int]:
    """Bytes of copies of shared keys and values, and what their gradients take besides those of the tokens.

    FlashAttention 2 makes gradients of keys and values for each query head, and adds them up afterwards. Our own
    kernels on Hopper need none of this: there it is room to spare.
    """
    keys, values = work.keys or work.tokens, 2 * config.num_kv_heads * config.head_dim * work.itemsize
    expanded = 2 * config.num_heads * config.head_dim * work.itemsize if config.num_kv_heads < config.num_heads else 0
    return (keys * values, keys * (values + expanded)) if work.keys else (0, keys * expanded)


def _mean_keys(config: DecoderConfig, longest: int) -> float:
    """How many keys a query of the longest sequence sees, on average over positions and layers."""
    windows = [longest if layer.window is None else min(layer.window, longest) for layer in config.layers]
    return sum(window - window**2 / (2 * longest) for window in windows) / len(windows)
