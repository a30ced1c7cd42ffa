"""Small trained changes of frozen layers: LoRA, DoRA and IA³.

An adapter is a module held by a `Linear` under a name. `forward(x, y, stored)` turns the layer's y = x Wᵀ into what it
gives with the adapter; `merge(weight)` is the one weight that does the same. At the start every kind is the identity.
Factors are fp32 whatever the activations are: it is they that are cast in use, never the activations.
"""

import copy
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from burnish.model.linear import Linear, Stored

HEAD = "lm_head"
"""The layer that only its own name targets: `all-linear` leaves it out."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What adapter to add, and to which layers."""

    kind: str = "lora"
    """A key of `ADAPTERS`."""
    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by alpha / rank, or by alpha / sqrt(rank) with `rslora`."""
    rslora: bool = False
    dropout: float = 0.0
    """On what the low-rank update reads, in training."""
    targets: str | tuple[str, ...] = "auto"
    """`all-linear` (but the head), a list of layer names or endings, or a regular expression that a whole name
    matches. `auto` is `all-linear` for LoRA and DoRA, and for IA³ the keys, values and the MLP's inner activations."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    """Ranks of single layers: an ending of their names, or a regular expression for it; the first match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    feedforward: tuple[str, ...] = ("down_proj",)
    """IA³ scales what these layers read; of the others it scales what they give."""

    def rank_of(self, path: str) -> int:
        """The rank in the layer of that name."""
        return next((rank for key, rank in self.rank_pattern.items() if _matches_pattern(key, path)), self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha in the layer of that name."""
        return next((alpha for key, alpha in self.alpha_pattern.items() if _matches_pattern(key, path)), self.alpha)


class LoRA(nn.Module):
    """y + s·B·A·x (arXiv 2106.09685, section 4.1), with s = alpha / rank, or alpha / sqrt(rank) (arXiv 2312.03732)."""

    kind = "lora"
    scales_bias = False

    def __init__(self, stored: Stored, path: str, spec: AdapterSpec, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.rank, self.alpha = spec.rank_of(path), spec.alpha_of(path)
        self.rslora, self.dropout = spec.rslora, spec.dropout
        self.A, self.B = _factors(stored, self.rank, generator)

    @property
    def scale(self) -> float:
        """s, which B·A·x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x: Float[Tensor, "*T I"], y: Float[Tensor, "*T O"], stored: Stored) -> Float[Tensor, "*T O"]:
        """y with the update added, in the dtype of x."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return y + F.linear(F.linear(x, self.A.to(x.dtype)) * self.scale, self.B.to(x.dtype))

    def merge(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """W + s·B·A, computed and returned in fp32."""
        return torch.addmm(weight.float(), self.B.detach(), self.A.detach(), alpha=self.scale)

    def merge_bias(self, bias: Float[Tensor, " O"]) -> Float[Tensor, " O"]:
        """The bias, which the update leaves alone."""
        return bias


class DoRA(nn.Module):
    """x W'ᵀ with the rows of W + s·B·A rescaled to a learned length m (arXiv 2402.09353, equation 5).

    W' = m · (W + s·B·A) / ‖W + s·B·A‖, row by row; no gradient flows through the norm (its section 4.3).
    """

    kind = "dora"
    scales_bias = False

    def __init__(self, stored: Stored, path: str, spec: AdapterSpec, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.lora = LoRA(stored, path, spec, generator)
        squares_O = _row_squares(stored)
        self.magnitude = nn.Parameter(squares_O.sqrt())
        # A frozen weight's row norms never change. Not saved: they belong to the base.
        self.squares: Tensor | None
        self.register_buffer("squares", None if _is_trained(stored) else squares_O, persistent=False)

    def forward(self, x: Float[Tensor, "*T I"], y: Float[Tensor, "*T O"], stored: Stored) -> Float[Tensor, "*T O"]:
        """y with the update added and its components rescaled, in the dtype of x."""
        # The ratio stays fp32: in bf16 it could not move from 1 by less than 1/256. Autograd keeps what it multiplies.
        return (self.lora(x, y, stored) * (self.magnitude / self._row_norms(stored))).to(x.dtype)

    @torch.no_grad()
    def _row_norms(self, stored: Stored) -> Float[Tensor, " O"]:
        """‖W + s·B·A‖ row by row: ‖w‖² + 2s·(W Aᵀ)·b + s²·b·(A Aᵀ)·b, which forms neither B·A nor their sum."""
        A, B, scale = self.lora.A.float(), self.lora.B.float(), self.lora.scale
        squares_O = _row_squares(stored) if self.squares is None else self.squares
        cross_OR = stored.matmul(A).T
        squares_O = squares_O + (B * (2 * scale * cross_OR + scale**2 * (B @ (A @ A.T)))).sum(dim=1)
        return squares_O.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def merge(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """W', computed and returned in fp32."""
        updated = self.lora.merge(weight)
        norms = updated.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny ** 0.5)  # a row of zeros stays one
        return updated * (self.magnitude.detach() / norms).unsqueeze(1)

    def merge_bias(self, bias: Float[Tensor, " O"]) -> Float[Tensor, " O"]:
        """The bias, which is not rescaled."""
        return bias


class IA3(nn.Module):
    """l ⊙ y: learned factors on keys, values and the MLP's inner activations (arXiv 2205.05638, section 3.3).

    The inner activations are what the MLP's last layer reads, so there `on_input` scales x in place of y.
    """

    kind = "ia3"

    def __init__(self, stored: Stored, path: str, spec: AdapterSpec, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.on_input = any(_ends([path], ending) for ending in spec.feedforward)
        self.scales_bias = not self.on_input
        self.factors = nn.Parameter(torch.ones(stored.shape[1 if self.on_input else 0], device=_device(stored)))

    def forward(self, x: Float[Tensor, "*T I"], y: Float[Tensor, "*T O"], stored: Stored) -> Float[Tensor, "*T O"]:
        """What the layer gives with its output, or its input, scaled, in the dtype of x."""
        if self.on_input:
            return stored.matmul((x * self.factors).to(x.dtype))
        return (y * self.factors).to(x.dtype)

    def merge(self, weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """W with its columns, or its rows, scaled, computed and returned in fp32."""
        factors = self.factors.detach()
        return weight.float() * (factors if self.on_input else factors.unsqueeze(1))

    def merge_bias(self, bias: Float[Tensor, " O"]) -> Float[Tensor, " O"]:
        """The bias, scaled with the output that it is part of."""
        return bias if self.on_input else bias.float() * self.factors.detach()


Adapter = LoRA | DoRA | IA3


def add_adapter(model: nn.Module, name: str, spec: AdapterSpec, generator: torch.Generator | None = None) -> list[str]:
    """The names of the layers that now have a new adapter called `name`, the identity until it is trained.

    `generator` decides the initial factors. Raises ValueError for a name that is taken, a target or pattern that
    matches no layer, and a kind that is not in `ADAPTERS`.
    """
    if spec.kind not in ADAPTERS:
        raise ValueError(f"adapter.kind={spec.kind} is not known; known are {', '.join(ADAPTERS)}")
    _check_name(model, name)
    if min([spec.rank, *spec.rank_pattern.values()]) < 1:
        raise ValueError("adapter.rank and the ranks of adapter.rank_pattern must be at least 1")
    layers = linear_layers(model)
    targets = select_targets(list(layers), spec)
    for path in targets:
        layers[path].adapters[name] = ADAPTERS[spec.kind](layers[path].weight, path, spec, generator)
    return targets


def copy_adapter(model: nn.Module, source: str, name: str) -> None:
    """A second adapter called `name`, which starts where `source` is and is trained apart from it."""
    layers = adapter_layers(model, source)
    _check_name(model, name)
    for path, adapter in layers.items():
        twin = copy.deepcopy(adapter)
        for parameter in twin.parameters():
            parameter.requires_grad_(True).grad = None
        linear_layers(model)[path].adapters[name] = twin


def set_dropout(model: nn.Module, name: str, dropout: float) -> None:
    """From now on an adapter drops this share of what its update reads, in training."""
    for adapter in adapter_layers(model, name).values():
        for part in adapter.modules():
            if isinstance(part, LoRA):
                part.dropout = dropout


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter. Raises ValueError where there is none of that name."""
    for path in adapter_layers(model, name):
        del linear_layers(model)[path].adapters[name]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in alphabetical order."""
    return sorted({name for layer in linear_layers(model).values() for name in layer.adapters})


def adapter_layers(model: nn.Module, name: str) -> dict[str, Adapter]:
    """An adapter's part in each layer, by the layer's name. Raises ValueError where there is no such adapter."""
    layers = linear_layers(model).items()
    found = {path: cast(Adapter, layer.adapters[name]) for path, layer in layers if name in layer.adapters}
    if not found:
        raise ValueError(f"the model has no adapter '{name}'; it has {adapter_names(model) or 'none'}")
    return found


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters, by their names in the model. Raises ValueError where there is no such adapter."""
    return {
        f"{path}.adapters.{name}.{key}": parameter
        for path, adapter in adapter_layers(model, name).items()
        for key, parameter in adapter.named_parameters()
    }


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """The layers that can carry adapters, by name, in the order of the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear)}


def select_targets(paths: list[str], spec: AdapterSpec) -> list[str]:
    """Which of these layers the spec means, in their order.

    Raises ValueError for a target or a pattern that matches none of them.
    """
    chosen = _chosen(paths, _IA3_TARGETS if spec.kind == "ia3" and spec.targets == "auto" else spec.targets)
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(spec, option):
            if not any(_matches_pattern(key, path) for path in chosen):
                raise ValueError(f"adapter.{option}: '{key}' matches no target{_nearest(key, chosen)}")
    return chosen


def _chosen(paths: list[str], targets: str | tuple[str, ...]) -> list[str]:
    if not targets:
        raise ValueError("adapter.targets is empty: write all-linear or the names of layers")
    if isinstance(targets, str):
        if targets in ("auto", "all-linear"):
            return [path for path in paths if path != HEAD]
        expression = _compiled(targets, "adapter.targets")
        chosen = [path for path in paths if expression.fullmatch(path)]
        if not chosen:
            hint = f"; for the layers whose names end in it write [{targets}]" if _ends(paths, targets) else ""
            raise ValueError(
                f"adapter.targets: no layer's whole name matches '{targets}'{hint or _nearest(targets, paths)}"
            )
        return chosen
    for target in targets:
        if not _ends(paths, target):
            raise ValueError(f"adapter.targets: '{target}' matches no layer{_nearest(target, paths)}")
    return [path for path in paths if any(_ends([path], target) for target in targets)]


def _ends(paths: list[str], target: str) -> bool:
    return any(path == target or path.endswith("." + target) for path in paths)


def _matches_pattern(key: str, path: str) -> bool:
    return _compiled(rf"(.*\.)?({key})", key).fullmatch(path) is not None


def _compiled(expression: str, place: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{place}: '{expression}' is not a regular expression: {error}") from None


def _nearest(target: str, paths: list[str]) -> str:
    """What the target may have meant, as the end of a message."""
    endings = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    close = difflib.get_close_matches(target, paths if "." in target else endings, n=1, cutoff=0.4)
    return f"; did you mean '{close[0]}'?" if close else f"; the layers are {', '.join(endings)}"


def _check_name(model: nn.Module, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"'{name}' cannot name an adapter: use letters, digits, - and _, and no name that PyTorch uses"
        )
    if name in adapter_names(model):
        raise ValueError(f"the model already has an adapter '{name}': remove it first, or choose another name")


def _factors(stored: Stored, rank: int, generator: torch.Generator | None) -> tuple[nn.Parameter, nn.Parameter]:
    """A, uniform within ±1/sqrt(inputs) as a new linear layer of PyTorch's is, and B, zero: their product is zero."""
    outputs, inputs = stored.shape
    device = torch.device("cpu") if generator is None else generator.device
    if rank > max(outputs, inputs):
        raise ValueError(
            f"adapter.rank={rank} is more than a layer of {outputs} x {inputs} can use; write a smaller one"
        )
    A = torch.rand(rank, inputs, generator=generator, device=device).mul_(2).sub_(1).mul_(inputs**-0.5)
    return nn.Parameter(A.to(_device(stored))), nn.Parameter(torch.zeros(outputs, rank, device=_device(stored)))


@torch.no_grad()
def _row_squares(stored: Stored) -> Tensor:
    return stored.dense(torch.float32).square().sum(dim=1)


def _device(stored: Stored) -> torch.device:
    return next(cast(nn.Module, stored).parameters()).device


def _is_trained(stored: Stored) -> bool:
    return any(parameter.requires_grad for parameter in cast(nn.Module, stored).parameters())


_IA3_TARGETS = ("k_proj", "v_proj", "down_proj")

ADAPTERS: dict[str, Callable[[Stored, str, AdapterSpec, torch.Generator | None], Adapter]] = {
    "lora": LoRA,
    "dora": DoRA,
    "ia3": IA3,
}
"""What `adapter.kind` names: (stored weight, layer name, spec, generator) -> adapter."""
