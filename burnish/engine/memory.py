"""Peak memory of a piece of work: CUDA's own count, or on the CPU a count of live tensor bytes."""

import weakref
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from burnish.engine.learner import Learner
from burnish.model.adapters import adapter_names
from burnish.model.decoder import Decoder
from burnish.model.fused_pass import joints_of
from burnish.optim.adamw import optimizer_tensors, state_bytes
from burnish.types import Batch

CLASSES = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "workspace")
"""What memory is held by. Workspace is all that is none of the others."""
FORWARD, HEAD, BACKWARD, UPDATE = "forward pass", "head", "backward pass", "optimizer step"
"""The phases of a step."""


@dataclass
class Peak:
    """The most bytes that tensors held at once."""

    bytes: int = 0


@dataclass
class Explained(Peak):
    """The most bytes that a step held at once, and what held them."""

    phase: str = ""
    """In which phase of the step it was."""
    classes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    """The bytes of each of CLASSES at that moment: they add up to the peak."""


class Event(NamedTuple):
    """Memory that was taken, or, with a negative size, given back."""

    address: int
    size: int


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return, each once, until Python and autograd have let go of them."""

    def __init__(self, peak: Peak, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak, self.live = peak, 0
        self.events: list[Event] = []
        self.seen: dict[int, Any] = {}
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self.seen:
            return
        self.live += size
        self.peak.bytes = max(self.peak.bytes, self.live)
        self.events.append(Event(key, size))

        def forget(_: Any) -> None:
            self.seen.pop(key, None)
            self.live -= size
            self.events.append(Event(key, -size))

        self.seen[key] = weakref.ref(storage, forget)


class CPUHistory:
    """What tensors take and give back on the CPU from now on: a count of its own."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        self._peak = Peak()
        self._count = _LiveBytes(self._peak, held)
        self._began = len(self._count.events)
        self._count.__enter__()

    def place(self) -> int:
        """How many events there have been."""
        return len(self._count.events) - self._began

    def end(self) -> tuple[list[Event], int]:
        """All events, and the peak."""
        self._count.__exit__(None, None, None)
        return self._count.events[self._began :], self._peak.bytes


class CUDAHistory:
    """What the allocator of a CUDA device gives and takes back from now on, by its own record."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.memory._record_memory_history(context=None, stacks="python")  # pyright: ignore[reportPrivateUsage]
        self._began = 0
        self._began = self.place()

    def place(self) -> int:
        """How many events there have been."""
        counts = torch.cuda.memory_stats(self.device)
        return counts["allocation.all.allocated"] + counts["allocation.all.freed"] - self._began

    def end(self) -> tuple[list[Event], int]:
        """All events, and the peak."""
        peak, number = torch.cuda.max_memory_allocated(self.device), self.device.index or 0
        snapshot = torch.cuda.memory._snapshot()  # pyright: ignore[reportPrivateUsage]
        torch.cuda.memory._record_memory_history(enabled=None)  # pyright: ignore[reportPrivateUsage]
        return events_of(cast(Any, snapshot)["device_traces"][number]), peak


def events_of(trace: Iterable[dict[str, Any]]) -> list[Event]:
    """The allocator's record of a device as events; what it notes besides is left out."""
    signs = {"alloc": 1, "free_requested": -1}
    return [Event(entry["addr"], signs[entry["action"]] * entry["size"]) for entry in trace if entry["action"] in signs]


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """The memory that a tensor is a view of; of a sharded one the rank's piece."""
    if isinstance(tensor, DTensor):  # a wrapper without memory of its own
        tensor = cast(DTensor, tensor.detach()).to_local()
    return tensor.untyped_storage()


@contextmanager
def measured_peak(device: torch.device, held: list[Tensor]) -> Generator[Peak]:
    """The peak of the work in the `with` block, to be read after it.

    On CUDA it is `torch.cuda.max_memory_allocated`. The CPU's allocator keeps no count, so there the bytes of live
    tensors are added up, starting with those `held` before: weights and optimizer state. This slows the block down.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
    else:
        with _LiveBytes(peak, held):
            yield peak


@contextmanager
def capped(device: torch.device, cap: int | None) -> Generator[None]:
    """Inside, the allocator of a CUDA device takes no more bytes than these; None: all that there are.

    Raises ValueError where there are fewer.
    """
    if cap is None:
        yield
        return
    total = torch.cuda.mem_get_info(device)[1]
    if cap > total:
        raise ValueError(
            f"a cap of {cap / 1e9:.1f}GB is more than the {total / 1e9:.1f}GB of this device: leave it out"
        )
    torch.cuda.set_per_process_memory_fraction(cap / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def free_bytes(device: torch.device, margin: float = 0.0) -> int:
    """What can still be allocated on a CUDA device, less a margin; of another device, what the host has.

    The margin is a share of the device's memory, at least 1 GiB, or the same share of what this process may take of it.
    """
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    number = torch.cuda.device(device).idx  # a device may come without one, which the next call wants
    allowed, reserved = total * torch.cuda.get_per_process_memory_fraction(number), torch.cuda.memory_reserved(device)
    kept = max(2**30, total * margin) if margin else 0.0
    left = min(free - kept, allowed * (1 - margin) - reserved)
    return int(left) + reserved - torch.cuda.memory_allocated(device)


def in_use(device: torch.device) -> int:
    """Bytes in use now, for the progress line: CUDA's allocator, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


@contextmanager
def explained_peak(model: Decoder, learners: Sequence[Learner]) -> Generator[Explained]:
    """The peak of the step in the `with` block, and what held it, to be read after it.

    Weights are parameters that are no adapter's, with what is kept of them decoded; adapters are counted with the
    copies that are multiplied with. Gradients are those of parameters. Activations are what the blocks made in the
    forward pass and was still there at its end; the head's own is made from there until the gradient of the hidden
    states is known. Let a step go before, which makes the states of the optimizer.
    """
    found = Explained()
    weights, adapters = _weights(model), _adapters(model)
    num_bytes = {"weights": _bytes(weights), "adapters": _bytes(adapters, but=weights)}
    num_bytes["optimizer"] = sum(state_bytes(learner.optimizer) for learner in learners)
    if model.device.type == "cuda":
        history = CUDAHistory(model.device)
    else:
        states = [optimizer_tensors(learner.optimizer, learner.parameters) for learner in learners]
        history = CPUHistory([*weights, *adapters, *(tensor for state in states for tensor in state.values())])
    record = Record(history.place)
    with ExitStack() as watching:
        ended = False
        try:
            record.watch(model, learners, watching)
            yield found
            ended = True
        finally:
            events, found.bytes = history.end()
            if ended:
                found.phase, made = record.made(events)
                found.classes |= num_bytes | made
                _settle(found)


class Record:
    """When the phases of a step began, and which gradients there were in the end."""

    def __init__(self, place: Callable[[], int]) -> None:
        self._place = place
        self._begins, self._phases = [0], [""]
        self._gradients: dict[int, list[int]] = {}
        """Their addresses, and by which events they were there."""

    def watch(self, model: Decoder, learners: Sequence[Learner], watching: ExitStack) -> None:
        """Note the phases from now on, until `watching` ends."""
        hidden, own = model.hidden, "hidden" in vars(model)

        def backward(_: Tensor) -> None:
            self.begin(BACKWARD)

        def noted(batch: Batch, adapter: str | None = None) -> Tensor:
            self.begin(FORWARD)
            hidden_TD = hidden(batch, adapter)
            self.begin(HEAD)
            if hidden_TD.requires_grad:
                hidden_TD.register_hook(backward)
            return hidden_TD

        model.hidden = noted  # so that no part of the model need know of this
        watching.callback(lambda: setattr(model, "hidden", hidden) if own else delattr(model, "hidden"))
        if model.fused is not None:
            taking = model.fused.taking
            taking.noted = self.gradient
            watching.callback(lambda: setattr(taking, "noted", None))
        for learner in learners:
            parameters = list(learner.parameters.values())
            hooks = [parameter.register_hook(self.gradient) for parameter in parameters]
            for hook in (*hooks, learner.optimizer.register_step_pre_hook(partial(self.update, parameters))):
                watching.callback(hook.remove)

    def begin(self, phase: str) -> None:
        """A phase begins, and the one before ends."""
        self._begins.append(self._place())
        self._phases.append(phase)

    def update(self, parameters: Iterable[Tensor], *_: object) -> None:
        """The optimizer begins its step, on the gradients that these have."""
        self.begin(UPDATE)
        for parameter in parameters:
            if parameter.grad is not None:
                self.gradient(parameter.grad)

    def gradient(self, gradient: Tensor | None) -> None:
        """This is there by now, and the gradient of a parameter: it may not last until the optimizer's step.

        None: it was taken as it appeared, and told of then.
        """
        if gradient is None:
            return
        self._gradients.setdefault(storage_of(gradient).data_ptr(), []).append(self._place())

    def made(self, events: Sequence[Event]) -> tuple[str, dict[str, int]]:
        """The phase of the peak, and the bytes of each class that the step itself made and that were there by then."""
        pieces, peak = _pieces(events)
        found: dict[str, int] = {"gradients": 0, "activations": 0, "head": 0}
        for piece in pieces:
            if piece.began <= peak < piece.ended and (name := self._class_of(piece, len(events))) is not None:
                found[name] += piece.size
        return self._phase_at(peak)[0], found

    def _class_of(self, piece: "_Piece", end: int) -> str | None:
        if any(piece.began < place <= piece.ended for place in self._gradients.get(piece.address, ())):
            return "gradients"
        phase, until = self._phase_at(piece.began)
        if phase == FORWARD and piece.ended >= (end if until is None else until):
            return "activations"
        return "head" if phase == HEAD else None

    def _phase_at(self, place: int) -> tuple[str, int | None]:
        """The phase of an event, and where the next one begins."""
        number = bisect_right(self._begins, place)
        return self._phases[max(0, number - 1)], next(iter(self._begins[number:]), None)


@dataclass
class _Piece:
    """Memory between the event that took it and the one that gave it back."""

    address: int
    size: int
    began: int
    ended: int


def _pieces(events: Sequence[Event]) -> tuple[list[_Piece], int]:
    """All memory that was taken, and the event after which the most was held; -1 where it was before all of them."""
    pieces: list[_Piece] = []
    live: dict[int, _Piece] = {}
    held, most, peak = 0, 0, -1
    for place, (address, size) in enumerate(events):
        held += size
        if size > 0:
            live[address] = _Piece(address, size, place, len(events))
            pieces.append(live[address])
        elif address in live:
            live.pop(address).ended = place
        if held > most:
            most, peak = held, place
    return pieces, peak


def _settle(found: Explained) -> None:
    """Let workspace be the rest. What had been there before and was given back by the time of the peak held nothing."""
    rest = found.bytes - sum(size for name, size in found.classes.items() if name != "workspace")
    for name in ("optimizer", "weights", "adapters"):  # states leave for the host; decoded copies are given back
        gone = min(found.classes[name], max(0, -rest))
        found.classes[name] -= gone
        rest += gone
    found.classes["workspace"] = max(0, rest)


def _weights(model: Decoder) -> list[Tensor]:
    """All parameters and buffers that are no adapter's, and what is kept of them decoded."""
    joints = [joint for part in model.fused.trunk.parts for joint in joints_of(part).values()] if model.fused else []
    own = [tensor for name, tensor in _on_device(model) if ".adapters." not in name]
    return own + [tensor for joint in joints for tensor in joint.held]


def _adapters(model: Decoder) -> list[Tensor]:
    """All of adapters, and the copies that are multiplied with."""
    found = [tensor for name, tensor in _on_device(model) if ".adapters." in name]
    for name in adapter_names(model):
        if model.fused is not None and model.fused.takes(name, training=True):
            factors = model.fused.prepare(name, model.dtype)
            pairs = factors.pairs if factors is not None else []
            found += [part for pair in pairs if pair is not None for part in (pair.A, pair.B)]
    return found


def _on_device(model: Decoder) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, but for what lies on the host beside a model on a device."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if tensor.device.type == model.device.type]


def _bytes(tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> int:
    """What tensors hold, memory that several share once, and none that others hold already."""
    others = {storage_of(tensor).data_ptr() for tensor in but}
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(storage_of, tensors)}
    return sum(size for address, size in storages.items() if address not in others)
