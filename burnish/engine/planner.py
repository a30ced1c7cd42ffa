"""Where things are while a run trains: what of a pass waits on the device, and how much of the optimizer's states.

Decided when all else is on the device, at the first pass that goes back; and once more where memory runs out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from torch import nn

from burnish.engine.budget import (
    LINK_RATE,
    Sizes,
    Work,
    block_peaks,
    leanest,
    make_plan,
    peak_bytes,
    seconds_of,
    sizes_of,
)
from burnish.engine.memory import free_bytes, in_use
from burnish.model.adapters import LoRA, linear_layers
from burnish.model.decoder import Decoder
from burnish.model.shelf import Plan, keep_everything, keep_inputs
from burnish.model.storage import Dense
from burnish.optim.adamw import AdamW, state_bytes
from burnish.settings import RunSettings, memory_bytes

MARGIN = 0.03
"""The share of a device's memory that plans leave free, but for the least, which then must just fit."""
SHARES = 8
"""States of the optimizer go to the host in steps of so many parts of them."""
LESS = 0.9
"""The share of what a plan takes that another one in its place takes at most."""


class Held(NamedTuple):
    """Bytes on the device that are not activations."""

    now: int
    """Weights, adapters and whatever else is there already."""
    to_come: int
    """Gradients and states of the optimizer that are not there yet."""
    movable: int = 0
    """The optimizer's states among these two that may be on the host instead."""
    passing: int = 0
    """Gradients among those to come that need not be there together: they can be taken as they appear."""
    twice: bool = False
    """Whether a step whose gradients are taken so is computed twice: first for the norm of all."""
    lent: int = 0
    """Bytes that states will take on the host whatever is planned, and have not taken yet."""


class Arranged(NamedTuple):
    """What is to be where."""

    plan: Plan
    away: int
    """Bytes of the optimizer's states that leave the device."""
    taken: bool = False
    """Whether gradients of matrices are taken as they appear."""
    seconds: float = 0.0
    """What all of that costs, for each micro-batch."""


@dataclass
class Planner:
    """Makes the plans of a decoder that is run by hand, and keeps the optimizer's states to them."""

    decoder: Decoder
    run: RunSettings
    states: float
    """Bytes that an optimizer holds for each trained number, where it is not known or has no pages."""
    device: torch.device
    optimizers: Sequence[torch.optim.Optimizer] = ()
    """Those of all that is trained in the decoder."""
    clips: bool = True
    """Whether gradients are clipped: to take them as they appear each step is then computed twice."""
    counted: bool = True
    """Whether run.step_tokens says how many micro-batches a step has: of answers that are yet to write it does not."""
    keys: float = 0.0
    """Keys that a batch reads for each of its tokens, where prompts are shared."""

    def __call__(self, keys: float = 0.0) -> Plan:
        """What of each block waits for the backward pass, by run.memory and what is on the device by now."""
        self.keys = keys
        found = plan_for(self.sizes(), self._num_blocks, self.run.memory, self.held(), self.device)
        self._send(found.away)
        if self.decoder.fused is not None:
            self.decoder.fused.taking.wanted = found.taken
        return found.plan

    def begin(self) -> None:
        """States that no plan has room for are on the host from the start: a resume reads them before it plans.

        At the least memory those are all; with an amount, those that it does not hold beside the weights.
        """
        held, amount = self.held(), memory_bytes(self.run.memory)
        states = sum(optimizer.to_come() for optimizer in self._paged())
        beyond = 0 if amount is None else held.now + states - amount
        wanted = held.movable if self.run.memory == "least" else min(held.movable, beyond)
        self._send(min(wanted, host_room_for(held, self.device)))

    def _send(self, size: int) -> None:
        """Let so many bytes of states be on the host, of all optimizers together."""
        for optimizer in self._paged():
            if size > 0:
                before = optimizer.movable()
                optimizer.evict(size)
                size -= before - optimizer.movable()

    def smaller(self) -> Plan | None:
        """A plan for the room that there really is, and less than the decoder's takes; None where there is none."""
        sizes, before = self.sizes(), self.decoder.plan
        held = self.held()
        room = min(room_for(self.run.memory, held, self.device), round(peak_bytes(before, sizes) * LESS))
        host_room = host_room_for(held, self.device)
        found = make_plan(sizes, self._num_blocks, room, host_room) or leanest(sizes, self._num_blocks, host_room)
        return found if peak_bytes(found, sizes) < peak_bytes(before, sizes) else None

    def room(self) -> int:
        """The bytes that there really are for a pass, all else being on the device; less than 0 where that has none."""
        return room_for(self.run.memory, self.held(), self.device)

    def spare(self) -> int:
        """The bytes that the largest pass would leave of the room."""
        return self.room() - peak_bytes(self.decoder.plan, self.sizes())

    def sizes(self) -> Sizes:
        """Of the largest micro-batch."""
        ranks = [part.rank for part in self.decoder.modules() if isinstance(part, LoRA)]
        work = Work(
            tokens=self.run.microbatch_tokens,
            longest=self.run.microbatch_tokens,
            rank=-(-max(ranks, default=0) // 16) * 16,
            itemsize=self.decoder.dtype.itemsize,
            storage=_storage(self.decoder),
            fp8=self.run.fp8,
            device=self.device.type,
            embedding=_movable(self.decoder),
            keys=math.ceil(self.run.microbatch_tokens * self.keys),
            a_step=self._passes_a_step,
        )
        return sizes_of(self.decoder.config, work)

    def held(self) -> Held:
        """What else is on the device, or will be."""
        trained = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trained if parameter.grad is None)
        here = sum(parameter.nbytes for parameter in self.decoder.parameters())
        now = in_use(self.device) if self.device.type == "cuda" else here
        states, movable = self._states(trained)
        passing, lent = min(gradients, self._passing()), sum(optimizer.to_lend() for optimizer in self._paged())
        if self.decoder.fused is not None and self.decoder.fused.taking.wanted:
            return Held(now, gradients - passing + states, movable, lent=lent)
        return Held(now, gradients + states, movable, passing, self.clips, lent)

    def _states(self, trained: list[nn.Parameter]) -> tuple[int, int]:
        """Bytes of states that are still to come to the device, and of all there that may leave it."""
        paged = self._paged()
        if paged and len(paged) == len(self.optimizers):
            movable = sum(optimizer.movable() for optimizer in paged) if has_host(self.device) else 0
            return sum(optimizer.to_come() for optimizer in paged), movable
        whole = round(sum(parameter.numel() for parameter in trained) * self.states)
        return max(0, whole - sum(state_bytes(optimizer) for optimizer in self.optimizers)), 0

    def _paged(self) -> list[AdamW]:
        """The optimizers whose states can leave the device."""
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, AdamW)]

    def _passing(self) -> int:
        """Bytes of gradients that need not be there together: those of the blocks' matrices but for one layer's."""
        alone = self.counted and self._passes_a_step == 1 and len(self._paged()) == len(self.optimizers) == 1
        if self.decoder.fused is None or not alone:
            return 0
        sizes = [sum(w.nbytes for w in weights) for weights in self.decoder.fused.trained_matrices()]
        return sum(sizes) - max(sizes, default=0)

    @property
    def _passes_a_step(self) -> int:
        return math.ceil(self.run.step_tokens / self.run.microbatch_tokens)

    @property
    def _num_blocks(self) -> int:
        return len(self.decoder.config.layers)


def plan_for(sizes: Sizes, num_blocks: int, memory: str, held: Held, device: torch.device) -> Arranged:
    """What `run.memory` asks for on this device, for the largest micro-batch; smaller ones use the same plan.

    An amount counts tensors, not what the CUDA driver itself takes, about half a GiB. Raises ValueError where not even
    the least fits. On a CPU, where no copy gains anything and the closed forms are rough, amounts are refused only if
    they do not hold the weights and what belongs to them.
    """
    if memory == "auto" and device.type != "cuda":
        return Arranged(keep_everything(num_blocks), 0)
    host_room, room, found = host_room_for(held, device), 0, None
    for margin, fill in ((MARGIN, memory != "least"), (0.0, False)):  # the least is tried where it may just fit
        if found is None:
            room = room_for(memory, held, device, margin)
            found = _best(sizes, num_blocks, room, host_room, held, fill)
    if found is None and (device.type == "cuda" or room <= 0):
        raise ValueError(_too_little(sizes, num_blocks, memory, held, free_bytes(device), host_room))
    return found or Arranged(keep_inputs(num_blocks), 0)


def _best(sizes: Sizes, num_blocks: int, room: int, host_room: int, held: Held, fill: bool) -> Arranged | None:
    """What costs the fewest seconds, or without `fill` what takes the least, with gradients taken or all together."""
    options = [arrange(sizes, num_blocks, room, host_room, held.movable, fill)]
    if held.passing:
        options.append(
            _taking(arrange(sizes, num_blocks, room + held.passing, host_room, held.movable, fill), sizes, held)
        )
    possible = [option for option in options if option is not None]
    return min(possible, key=lambda option: option.seconds, default=None) if fill else next(reversed(possible), None)


def arrange(
    sizes: Sizes, num_blocks: int, room: int, host_room: int, movable: int, fill: bool = True
) -> Arranged | None:
    """What costs the fewest seconds within `room` bytes of the device: activations and optimizer states compete.

    States cross the bus twice in an optimizer step, once each way, while nothing else is computed. Without `fill` all
    that may be on the host is there.
    """
    movable, best, cost = min(movable, host_room), None, math.inf
    for away in [movable * share // SHARES for share in range(SHARES + 1)] if fill and movable else [movable]:
        crossing = 2 * away / LINK_RATE / sizes.a_step
        if crossing >= cost:
            break
        plan = make_plan(sizes, num_blocks, room + away, host_room - away, fill)
        if plan is not None and crossing + seconds_of(plan, sizes) < cost:
            cost = crossing + seconds_of(plan, sizes)
            best = Arranged(plan, away, seconds=cost)
    return best


def _taking(found: Arranged | None, sizes: Sizes, held: Held) -> Arranged | None:
    """The same where gradients are taken as they appear."""
    if found is None:
        return None
    again = 3 * sizes.forward * len(found.plan.kept) + seconds_of(found.plan, sizes) if held.twice else 0.0
    return found._replace(taken=True, seconds=found.seconds + again)


def room_for(memory: str, held: Held, device: torch.device, margin: float = MARGIN) -> int:
    """The bytes that are left for a pass, by `run.memory` and what is free less a margin."""
    amount, free = memory_bytes(memory), free_bytes(device, margin)
    return (free if amount is None else min(free, amount - held.now)) - held.to_come


def host_room_for(held: Held, device: torch.device) -> int:
    """The bytes of the host's memory that a plan may use: less what states will take there whatever is planned."""
    return max(0, host_bytes(device) - held.lent)


def host_bytes(device: torch.device) -> int:
    """What of the host's memory may be used beside the device's: half of what is free; nothing where they are one."""
    return psutil.virtual_memory().available // 2 if has_host(device) else 0


def has_host(device: torch.device) -> bool:
    """Whether the host's memory is another one than the device's."""
    return device.type == "cuda"


def amount_of(size: float) -> str:
    """Bytes as `run.memory` takes them, rounded up to a tenth."""
    unit, name = (1e9, "GB") if size > 999.9e6 else (1e6, "MB")
    return f"{math.ceil(size / unit * 10) / 10:.1f}{name}"


def _movable(decoder: Decoder) -> int:
    """Bytes of the embedding, where it may lie on the host."""
    table = decoder.model.embed_tokens.weight
    return table.nbytes if table.is_cuda and not table.requires_grad and not decoder.config.tied else 0


def _storage(decoder: Decoder) -> str:
    """How the weights of the blocks are kept."""
    stored = next(layer.stored for path, layer in linear_layers(decoder).items() if path != "lm_head")
    if not isinstance(stored, Dense):
        return "nf4"
    half = stored.weight.dtype != torch.float32
    if stored.weight.requires_grad:
        return "full16" if half else "full"
    return "bf16" if half else "fp32"


def _too_little(sizes: Sizes, num_blocks: int, memory: str, held: Held, free: int, host_room: int) -> str:
    """One line: what takes how much, and what to write instead."""
    away = min(held.movable, host_room)
    plan = leanest(sizes, num_blocks, host_room - away)
    least, block = peak_bytes(plan, sizes), max(block_peaks(plan, sizes))
    to_come = held.to_come - away - held.passing  # less than nothing, where states are there already and leave
    needed = held.now + to_come + least
    table = (
        f"weights and adapters {amount_of(held.now + min(0, to_come))}, "
        f"gradients and optimizer {amount_of(max(0, to_come))}"
        f"{_ON_HOST if away or held.lent else ''}{_AS_THEY_APPEAR if held.passing else ''}, "
        f"activations at least {amount_of(least - max(block, sizes.head))}, workspace {amount_of(block)} in a block or "
        f"{amount_of(sizes.head)} in the head: {amount_of(needed)} in all"
    )
    if to_come + least <= free:
        return f"run.memory={memory} is too little: {table}; write run.memory={amount_of(needed)} or {_LESS}"
    usable = amount_of(held.now + free)
    return f"run.memory={memory}: {usable} of this device can be used, too little: {table}; write {_LESS}"


_ON_HOST = " with its states on the host"
_AS_THEY_APPEAR = ", gradients of one layer at a time"
_LESS = "a smaller run.microbatch_tokens"
