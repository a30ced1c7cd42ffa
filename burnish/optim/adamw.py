"""AdamW (Loshchilov and Hutter 2019) over many tensors in few launches, and its state as named tensors.

Where there is a kernel the host goes once over the tensors and writes their addresses into a table, before the step
waits for the device, and one launch does the rest: clipping, both moments, decay, the update and its rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from burnish.ops import runs_kernels
from burnish.optim import eight_bit
from burnish.optim.update import Update, reference_update

_MOMENTS = {False: ("exp_avg", "exp_avg_sq"), True: ("state1", "state2", "absmax1", "absmax2")}
"""What the moments are called, in fp32 and in 8 bits."""


def adamw(
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    kind: str = "adamw",
    seed: int = 0,
) -> torch.optim.Optimizer:
    """AdamW over the parameters; only matrices decay, not gains, biases or scales.

    `kind` is adamw, whose states are fp32, or adamw8bit (`optim/eight_bit.py`). Weights are fp32, or bf16 without an
    fp32 copy: those are rounded by chance (`optim/rounding.py`), and `seed` decides how. The order of `parameters` is
    the order of the state. Raises ValueError for 8-bit states of weights that are split over ranks.
    """
    assert all(parameter.dtype in (torch.float32, torch.bfloat16) for parameter in parameters.values())
    sharded = any(_is_split(parameter) for parameter in parameters.values())
    if sharded and kind == "adamw8bit":
        raise ValueError("optim.kind=adamw8bit works on one device, not over several ranks: write optim.kind=adamw")
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    all_fp32 = all(parameter.dtype == torch.float32 for parameter in parameters.values())
    kernel = not sharded and all(takes_kernel(parameter) for parameter in parameters.values())
    if kind == "adamw" and all_fp32 and not kernel:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return AdamW(groups, lr, betas, eps, kind == "adamw8bit", seed)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as `parameter.state` -> tensor: what a checkpoint stores."""
    return {
        f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(float(value))
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put a stored state back, on each parameter's own device; the step counter stays where the optimizer keeps it."""
    for name, parameter in parameters.items():
        keys = [key for key in ("step", *_MOMENTS[False], *_MOMENTS[True]) if f"{name}.{key}" in tensors]
        state: dict[str, Any] = {key: tensors[f"{name}.{key}"].to(parameter.device) for key in keys}
        eight = isinstance(optimizer, AdamW) and optimizer.keeps_8_bits(parameter)
        if state and _MOMENTS[eight][0] not in state:
            raise ValueError("the checkpoint was written with another optim.kind than this one: write that of the run")
        if state and isinstance(optimizer, AdamW):
            state["step"] = int(state["step"])
        optimizer.state[parameter] = state
    if isinstance(optimizer, AdamW):
        optimizer.forget_places()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the states hold by now."""
    parts = [part for state in optimizer.state.values() for part in state.values()]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def takes_kernel(tensor: Tensor) -> bool:
    """Whether a kernel updates this tensor."""
    return runs_kernels(tensor.device)


class _Place(NamedTuple):
    """Where a weight and its moments lie, found once."""

    weight: int
    moments: tuple[int, ...]
    state: dict[str, Any]


class _Bundle:
    """Parameters of one group, dtype and kind of state: what one launch takes."""

    def __init__(self, group: dict[str, Any], parameters: list[nn.Parameter], eight: bool, numbers: list[int]) -> None:
        self.group, self.parameters, self.eight, self.numbers = group, parameters, eight, numbers
        self.half = parameters[0].dtype == torch.bfloat16
        self.split = any(_is_split(parameter) for parameter in parameters)
        self.kernel = all(takes_kernel(parameter) for parameter in parameters)
        self.layout: tuple[Tensor, Tensor] | None = None
        """What a table holds that no step changes."""
        self.places: list[_Place | None] = [None] * len(parameters)


class Launch(NamedTuple):
    """A launch that the next step makes, its table on the device."""

    bundle: _Bundle
    step: int
    table: Any
    states: list[dict[str, Any]]
    """Of the tensors that have a gradient."""
    held: list[Tensor]
    """Contiguous copies of gradients that were not: they must live until the launch."""

    def squares(self) -> Tensor:
        """Sums of squares over parts of the gradient."""
        from burnish.kernels import adam

        return adam.squares(self.table)

    def update(self, scale: Tensor | None, seed: int) -> None:
        """Weights and moments after the step."""
        from burnish.kernels import adam

        device = self.bundle.parameters[0].device
        scale = torch.ones((), device=device) if scale is None else scale
        maps: list[Tensor] = []
        if self.bundle.eight:
            maps = [eight_bit.signed_map(device), eight_bit.unsigned_map(device)]
            maps += [*eight_bit.search(device, True), *eight_bit.search(device, False)]
        numbers = Update.at(self.step, self.bundle.group)
        adam.update(self.table, scale, numbers, seed, self.step, maps, eight_bit.LOWEST)


class AdamW(torch.optim.Optimizer):
    """AdamW with the weights, the states or the device that torch's own does not serve."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        eight: bool,
        seed: int,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.seed, self._eight = seed, eight
        self._scale: Tensor | None = None
        self._launches: list[Launch] | None = None
        self._bundles: list[_Bundle] = []
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for group in self.param_groups:
            sorts: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                assert parameter.is_contiguous()
                sorts.setdefault((parameter.dtype, self.keeps_8_bits(parameter)), []).append(parameter)
            for (_, few_bits), alike in sorts.items():
                self._bundles.append(_Bundle(group, alike, few_bits, [numbers[p] for p in alike]))

    def keeps_8_bits(self, parameter: nn.Parameter) -> bool:
        """Whether its moments are in 8 bits: those of small tensors never are."""
        return self._eight and parameter.numel() >= eight_bit.SMALLEST

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        """The norm of the whole gradient, on its device, without waiting for it; 0 clips nothing.

        The next step takes the gradient scaled down to a norm of `largest`. Between the two no gradient may change
        its place.
        """
        sums = [launch.squares() for launch in self.launches()]
        others = [p.grad for bundle in self._bundles if not bundle.kernel for p in bundle.parameters]
        sums += [torch.linalg.vector_norm(g, dtype=torch.float32).square().view(1) for g in others if g is not None]
        device = self.param_groups[0]["params"][0].device
        norm = torch.cat([torch.zeros(1, device=device), *sums]).sum(dtype=torch.float64).sqrt().float()
        self._scale = (largest / (norm + 1e-6)).clamp(max=1.0) if largest else None
        return norm

    @property
    def steps_unseen(self) -> bool:
        """Whether `step` takes its `healthy`: every weight is updated by a kernel."""
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
        assert healthy is None or self.steps_unseen
        launches, scale = self.launches(), self._scale
        if healthy is not None:
            scale = torch.where(healthy, 1.0 if scale is None else scale, float("nan")).float()
        for launch in launches:
            launch.update(scale, self.seed)
            for state in launch.states:
                state["step"] += 1
        for bundle in self._bundles:
            if not bundle.kernel:
                self._step_without_kernel(bundle, scale)
        self._scale = self._launches = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and with them what `clip` prepared."""
        self._scale = self._launches = None
        super().zero_grad(set_to_none)

    def forget_places(self) -> None:
        """Look again for where moments lie: somebody has put others in their place."""
        for bundle in self._bundles:
            bundle.places = [None] * len(bundle.parameters)

    def launches(self) -> list[Launch]:
        """The launches of the next step: the host's one pass over tensors that have a kernel."""
        if self._launches is None:
            self._launches = [one for bundle in self._bundles if bundle.kernel for one in self._tables(bundle)]
        return self._launches

    def _step_without_kernel(self, bundle: _Bundle, scale: Tensor | None) -> None:
        for number, parameter in zip(bundle.numbers, bundle.parameters, strict=True):
            if parameter.grad is not None:
                state = self._state_of(parameter, bundle.eight)
                state["step"] += 1
                pieces = {key: _piece(value) for key, value in state.items() if key != "step"}
                update, counter = Update.at(state["step"], bundle.group), (number, state["step"])
                reference_update(_piece(parameter), _piece(parameter.grad), pieces, update, scale, self.seed, counter)

    def _tables(self, bundle: _Bundle) -> Iterator[Launch]:
        """A launch for each count of steps that parameters have taken: one, unless gradients were missing before."""
        rows: list[tuple[int, ...]] = []
        states: dict[int, list[dict[str, Any]]] = {}
        steps: list[int] = []
        held: list[Tensor] = []
        missing = (0,) * (2 + len(_MOMENTS[bundle.eight]))
        for i, parameter in enumerate(bundle.parameters):
            gradient = parameter.grad
            if gradient is None:
                rows.append(missing)
                steps.append(0)
                continue
            if bundle.split:
                gradient = _piece(gradient)
            if not gradient.is_contiguous():
                gradient = gradient.contiguous()
                held.append(gradient)
            weight = (_piece(parameter) if bundle.split else parameter).data_ptr()
            place = bundle.places[i]
            if place is None or place.weight != weight:
                bundle.places[i] = place = self._place(parameter, weight, bundle.eight)
            step = place.state["step"] + 1
            rows.append((weight, gradient.data_ptr(), *place.moments))
            steps.append(step)
            states.setdefault(step, []).append(place.state)
        for step in sorted(states):
            only = rows if len(set(steps)) == 1 else _only(rows, steps, step)
            yield Launch(bundle, step, _table(bundle, only), states[step], held)

    def _place(self, parameter: nn.Parameter, weight: int, eight: bool) -> _Place:
        state = self._state_of(parameter, eight)
        return _Place(weight, tuple([_piece(state[name]).data_ptr() for name in _MOMENTS[eight]]), state)

    def _state_of(self, parameter: nn.Parameter, eight: bool) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if state:
            return state
        state["step"] = 0
        if not eight:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            return state
        for moment in ("1", "2"):
            state[f"state{moment}"] = torch.zeros_like(parameter, dtype=torch.uint8)
        for moment in ("1", "2"):
            blocks = eight_bit.num_blocks(parameter.numel())
            state[f"absmax{moment}"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        return state


def _is_split(tensor: Tensor) -> bool:
    """Whether this is a DTensor, split over ranks: only the engine speaks torch.distributed."""
    return hasattr(tensor, "to_local")


def _piece(tensor: Any) -> Tensor:
    """This rank's part of a tensor that is split over ranks; any other tensor as it is."""
    return tensor.to_local() if _is_split(tensor) else tensor


def _only(rows: list[tuple[int, ...]], steps: list[int], step: int) -> list[tuple[int, ...]]:
    nothing = (0,) * len(rows[0])
    return [row if taken == step else nothing for row, taken in zip(rows, steps, strict=True)]


def _table(bundle: _Bundle, rows: list[tuple[int, ...]]) -> Any:
    """The addresses on the device: one small copy, which the host does not wait for."""
    from burnish.kernels import adam

    device = bundle.parameters[0].device
    if bundle.layout is None:
        counts = [_piece(parameter).numel() for parameter in bundle.parameters]
        facts = torch.tensor(list(zip(counts, bundle.numbers, strict=True)), dtype=torch.int64)
        bundle.layout = facts.to(device), adam.chunks_of(counts).to(device)
    addresses = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    aligned = not bool((addresses & 15).any())
    on_device = addresses.to(device, non_blocking=True)
    return adam.Table(on_device, *bundle.layout, half=bundle.half, aligned=aligned)
