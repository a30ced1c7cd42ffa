"""AdamW (Loshchilov and Hutter 2019) over many tensors in few launches, and its state as named tensors.

Where there is a kernel the host goes once over the tensors and writes their addresses into a table, before the step
waits for the device, and one launch does the rest: clipping, both moments, decay, the update and its rounding.

Moments lie in pages (`optim/pages.py`), which leave the device when memory is short and come back when it is not. That
launch updates what is on the device; pages that are on the host follow, from the last one on, through two buffers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from burnish.ops import runs_kernels
from burnish.optim import eight_bit
from burnish.optim.bundle import Bundle, Launch, Reference, is_split, local
from burnish.optim.pages import MOMENTS, PAGE, Pages, Piece, places


def adamw(
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    kind: str = "adamw",
    seed: int = 0,
    room: int | None = None,
) -> torch.optim.Optimizer:
    """AdamW over the parameters; only matrices decay, not gains, biases or scales.

    `kind` is adamw, whose states are fp32, or adamw8bit (`optim/eight_bit.py`). Weights are fp32, or bf16 without an
    fp32 copy: those are rounded by chance (`optim/rounding.py`), and `seed` decides how. The order of `parameters` is
    the order of the state. `room` is how many bytes the states may take on the device, if not all that they need.
    Raises ValueError for 8-bit states of weights that are split over ranks.
    """
    assert all(parameter.dtype in (torch.float32, torch.bfloat16) for parameter in parameters.values())
    sharded = any(is_split(parameter) for parameter in parameters.values())
    if sharded and kind == "adamw8bit":
        raise ValueError("optim.kind=adamw8bit works on one device, not over several ranks: write optim.kind=adamw")
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    all_fp32 = all(parameter.dtype == torch.float32 for parameter in parameters.values())
    kernel = not sharded and all(takes_kernel(parameter) for parameter in parameters.values())
    if kind == "adamw" and all_fp32 and not kernel and room is None:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return AdamW(groups, lr, betas, eps, kind == "adamw8bit", seed, room)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as `parameter.state` -> tensor: what a checkpoint stores.

    Of states that lie in one page these are views, wherever it is, to be used before the next step or move of pages;
    those in several pages are put together on the host.
    """
    return {
        f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(float(value))
        for name, parameter in parameters.items()
        for key, value in _named(optimizer, parameter).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put a stored state back, wherever the optimizer keeps it by now; the tensors may be on any device."""
    for name, parameter in parameters.items():
        names = ("step", *MOMENTS[False], *MOMENTS[True])
        state: dict[str, Any] = {key: tensors[f"{name}.{key}"] for key in names if f"{name}.{key}" in tensors}
        eight = isinstance(optimizer, AdamW) and optimizer.keeps_8_bits(parameter)
        if state and MOMENTS[eight][0] not in state:
            raise ValueError("the checkpoint was written with another optim.kind than this one: write that of the run")
        if isinstance(optimizer, AdamW):
            optimizer.put_state(parameter, state)
        else:
            optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in state.items()}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the states hold by now on the device."""
    parts = [part for state in optimizer.state.values() for part in state.values()]
    paged = optimizer.held() if isinstance(optimizer, AdamW) else 0
    return paged + sum(part.nbytes for part in parts if isinstance(part, Tensor))


def takes_kernel(tensor: Tensor) -> bool:
    """Whether a kernel updates this tensor."""
    return runs_kernels(tensor.device)


class AdamW(torch.optim.Optimizer):
    """AdamW with the weights, the states or the device that torch's own does not serve.

    Gradients may also be taken one by one, as the backward pass completes them: by `measure_one` for the norm of all,
    after which they may go, or by `step_one`, which lets go of them. The bits are those of `clip` and `step`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        eight: bool,
        seed: int,
        room: int | None = None,
        page: int = PAGE,
    ) -> None:
        """`room` is how many bytes the states may take on the device, pages of `page` bytes; None: all that they need.

        States of weights that are split over ranks are in no page: they stay on the device.
        """
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.seed, self._eight = seed, eight
        self._scale: Tensor | None = None
        self._launches: list[Launch] | None = None
        self._squares: dict[nn.Parameter, Tensor] = {}
        self._bundles: list[Bundle] = []
        self._places: dict[nn.Parameter, tuple[Bundle, int]] = {}
        sizes: list[int] = []
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for group in self.param_groups:
            sorts: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                assert parameter.is_contiguous()
                sorts.setdefault((parameter.dtype, self.keeps_8_bits(parameter)), []).append(parameter)
            for (_, few_bits), alike in sorts.items():
                kernel = all(takes_kernel(parameter) for parameter in alike)
                own = [numbers[p] for p in alike]
                self._bundles.append(bundle := Bundle(group, alike, own, few_bits, kernel, page, len(sizes)))
                self._places |= {parameter: (bundle, i) for i, parameter in enumerate(alike)}
                sizes += bundle.sizes
        self._pages = Pages(sizes, self.param_groups[0]["params"][0].device, room)
        self._moves = 0
        """Those of the pages that were known when places were looked for."""

    def keeps_8_bits(self, parameter: nn.Parameter) -> bool:
        """Whether its moments are in 8 bits: those of small tensors never are."""
        return self._eight and parameter.numel() >= eight_bit.SMALLEST

    def held(self) -> int:
        """Bytes that pages and their buffers hold on the device."""
        return self._pages.held()

    def away(self) -> int:
        """Bytes of pages that are on the host."""
        return self._pages.away()

    def to_come(self) -> int:
        """Bytes that pages will take on the device besides those that they hold: the first step makes them."""
        return self._pages.to_come()

    def to_lend(self) -> int:
        """Bytes that pages will take on the host besides those that they hold there."""
        return self._pages.to_lend()

    def movable(self) -> int:
        """Bytes of pages on the device, there or to come, that could as well be on the host."""
        return self._pages.movable()

    def evict(self, size: int) -> int:
        """Move pages to the host until so many bytes of the device are free; returns how many that are.

        It may be done at any time but within a step. Pages that there would be on the device after the first step
        count, and will be on the host.
        """
        self._launches = None
        return self._pages.evict(size)

    def restore(self, room: int) -> int:
        """Bring pages back for which so many free bytes of the device are enough; returns how many they take."""
        self._launches = None
        return self._pages.restore(room)

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        """The norm of the whole gradient, on its device, without waiting for it; 0 clips nothing.

        The next step takes the gradient scaled down to a norm of `largest`. Between the two no gradient may change
        its place. Gradients that have been measured are taken as they were then.
        """
        sums = [part for bundle in self._bundles for part in self._sums(bundle)]
        self._squares.clear()
        device = self.param_groups[0]["params"][0].device
        norm = torch.cat([torch.zeros(1, device=device), *sums]).sum(dtype=torch.float64).sqrt().float()
        self._scale = (largest / (norm + 1e-6)).clamp(max=1.0) if largest else None
        return norm

    @torch.no_grad()
    def measure_one(self, parameter: nn.Parameter) -> None:
        """Keep of a complete gradient what the next `clip` needs to know of it: afterwards it may go."""
        assert parameter.grad is not None
        bundle, i = self._places[parameter]
        [self._squares[parameter]] = self._squares_of(bundle, self._planned(bundle, range(i, i + 1)), [parameter])

    @property
    def steps_unseen(self) -> bool:
        """Whether steps take their `healthy`: every weight is updated by a kernel."""
        return bool(self._bundles) and all(bundle.kernel for bundle in self._bundles)

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None, healthy: Tensor | None = None
    ) -> None:
        """One step on the gradients that there are, or that the last `clip` saw.

        Where `healthy`, a flag on the device, is not set, no weight and no moment changes; the host need not wait to
        know it.
        """
        assert closure is None
        plain = [bundle for bundle in self._bundles if not bundle.kernel]
        works = [*self.launches(), *(self._reference(bundle, range(len(bundle.parameters))) for bundle in plain)]
        self._update(works, self._scale_if(healthy))
        self._scale = self._launches = None

    @torch.no_grad()
    def step_one(self, parameter: nn.Parameter, healthy: Tensor | None = None) -> None:
        """The step of one parameter, whose gradient is complete, and goes.

        It is scaled as the last `clip` said, of this step's gradients as they were measured in an earlier pass or of
        an earlier step's, unless there was a `step` or a `zero_grad` since.
        """
        assert parameter.grad is not None
        bundle, i = self._places[parameter]
        one = range(i, i + 1)
        works = self._planned(bundle, one) if bundle.kernel else [self._reference(bundle, one)]
        self._update(works, self._scale_if(healthy))
        parameter.grad = self._launches = None

    @torch.no_grad()
    def take_one(self, parameter: nn.Parameter, healthy: Tensor) -> None:
        """Measure a complete gradient, and take its step if it is finite and `healthy` is set; it goes in any case."""
        self.measure_one(parameter)
        healthy = healthy & self._squares[parameter].sum(dtype=torch.float64).isfinite()
        if self.steps_unseen:
            self.step_one(parameter, healthy)
        elif healthy:
            self.step_one(parameter)
        parameter.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and with them what `clip` prepared."""
        self._scale = self._launches = None
        self._squares.clear()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises NotImplementedError once the optimizer is made."""
        if "_bundles" in vars(self):
            raise NotImplementedError("states are laid out once: make a new optimizer of all groups")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Raises NotImplementedError: moments are not where torch looks for them."""
        raise NotImplementedError("use burnish.optim.adamw.optimizer_tensors in place of state_dict")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raises NotImplementedError, as `state_dict` does."""
        raise NotImplementedError("use burnish.optim.adamw.restore_optimizer in place of load_state_dict")

    def launches(self) -> list[Launch]:
        """The launches of the next step: the host's one pass over tensors that have a kernel."""
        if self._launches is None:
            self._pages.prefetch()
            self._launches = self._planned()
        return self._launches

    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Its state: the count of its steps, and the moments as `optimizer_tensors` gives them."""
        (bundle, i), state = self._places[parameter], self.state.get(parameter)
        if not state or bundle.split:
            return state or {}
        found: dict[str, Any] = {"step": state["step"]}
        pieces = bundle.pieces[i]
        parts = [piece.moments(self._pages.contents(piece.page), bundle.eight) for piece in pieces]
        for name in MOMENTS[bundle.eight]:
            if len(parts) == 1:
                whole = parts[0][name]
            else:
                whole = torch.empty(places(name, parameter.numel()), dtype=parts[0][name].dtype)
                for piece, part in zip(pieces, parts, strict=True):
                    whole[places(name, piece.first) : places(name, piece.last)].copy_(part[name])
            found[name] = whole if name.startswith("absmax") else whole.view(parameter.shape)
        return found

    @torch.no_grad()
    def put_state(self, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
        """Replace its state, by an empty one also."""
        bundle, i = self._places[parameter]
        own = self.state[parameter] = {"step": int(state["step"])} if state else {}
        bundle.forget_places()
        if bundle.split:
            own |= {name: state[name].to(parameter.device) for name in MOMENTS[bundle.eight] if state}
            return
        for piece in bundle.pieces[i]:
            if state or self._pages.made(piece.page):
                self._pages.put(piece, bundle.eight, state)

    def _update(self, works: Sequence[Launch | Reference], scale: Tensor | None) -> None:
        """What is on the device at once, then pages from the host, one after the other."""
        pages = self._pages
        for work in works:
            work.update(scale, self.seed, range(-1, pages.resident))
        first = max(pages.resident, min((work.pages.start for work in works), default=0))
        for page in reversed(range(first, max((work.pages.stop for work in works), default=0))):
            due = [work for work in works if page in work.pages]
            if due and pages.made(page):
                pages.fetch(page)
                for work in due:
                    work.update(scale, self.seed, range(page, page + 1))
                pages.updated(page)
        for state in (state for work in works for state in work.states):
            state["step"] += 1

    def _scale_if(self, healthy: Tensor | None) -> Tensor | None:
        """What gradients are multiplied with: no number, where they are not to be taken."""
        if healthy is None:
            return self._scale
        assert self.steps_unseen
        return torch.where(healthy, 1.0 if self._scale is None else self._scale, float("nan")).float()

    def _planned(self, bundle: Bundle | None = None, members: range = range(0)) -> list[Launch]:
        """The launches over all parameters, or over these of a bundle."""
        every = [(bundle, range(len(bundle.parameters))) for bundle in self._bundles]
        chosen = every if bundle is None else [(bundle, members)]
        while True:
            if self._moves != self._pages.moves:
                self._moves = self._pages.moves
                for own in self._bundles:
                    own.forget_places()
            launches = [
                launch
                for own, some in chosen
                if own.kernel
                for launch in own.launches(some, self._state_of, self._moments_of)
            ]
            if self._moves == self._pages.moves:  # else pages had to move while states were made
                return launches

    def _reference(self, bundle: Bundle, members: range) -> Reference:
        taken = [i for i in members if bundle.parameters[i].grad is not None]
        for i in taken:
            for piece in bundle.pieces[i]:
                self._moments_of(bundle.parameters[i], piece)
        states = [self._state_of(bundle.parameters[i]) for i in taken]
        return Reference(bundle, taken, states, self._moments_of)

    def _sums(self, bundle: Bundle) -> list[Tensor]:
        """Sums of squares over parts of a bundle's gradients, in one order however they are found."""
        if not self._squares:
            launches = [launch for launch in self.launches() if launch.bundle is bundle]
            return self._squares_of(bundle, launches, bundle.parameters)
        for parameter in bundle.parameters:
            if parameter.grad is not None and parameter not in self._squares:
                self.measure_one(parameter)
        if not any(parameter in self._squares for parameter in bundle.parameters):
            return []
        found: list[Tensor] = []
        for i, parameter in enumerate(bundle.parameters):
            if parameter in self._squares:
                found.append(self._squares[parameter])
            elif bundle.kernel:
                found.append(
                    torch.zeros(len(bundle.programs(bundle.rows_of(range(i, i + 1)))), device=parameter.device)
                )
        return found

    def _squares_of(
        self, bundle: Bundle, launches: Sequence[Launch], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        if not bundle.kernel:
            grads = [parameter.grad for parameter in parameters]
            return [torch.linalg.vector_norm(g, dtype=torch.float32).square().view(1) for g in grads if g is not None]
        total: Tensor | None = None
        for launch in launches:  # each with zeros where another has its gradients
            total = launch.squares() if total is None else total + launch.squares()
        return [] if total is None else [total]

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            if is_split(parameter):
                state |= {name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS[False]}
        return state

    def _moments_of(self, parameter: nn.Parameter, piece: Piece) -> dict[str, Tensor]:
        """Those of a piece, where they are when it is updated."""
        if piece.page < 0:
            state = self._state_of(parameter)
            return {name: local(state[name]).view(-1) for name in MOMENTS[False]}
        return piece.moments(self._pages.buffer(piece.page), self.keeps_8_bits(parameter))


def _named(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    return optimizer.tensors_of(parameter) if isinstance(optimizer, AdamW) else optimizer.state.get(parameter, {})
