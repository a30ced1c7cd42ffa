"""One step of AdamW on one tensor: its numbers, and the reference in plain PyTorch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from burnish.optim import eight_bit
from burnish.optim.rounding import round_by_chance

_SLICE = 2**20  # values that are worked on at once, so that temporaries stay at a few MB


class Update(NamedTuple):
    """The numbers of one step, as the kernel takes them."""

    kept: float
    """What decay leaves of a weight: 1 - lr · weight_decay."""
    size: float
    """lr / (1 - beta1^t)."""
    inverse_root: float
    """1 / sqrt(1 - beta2^t)."""
    eps: float
    beta1: float
    rest1: float
    """1 - beta1."""
    beta2: float
    rest2: float

    @classmethod
    def at(cls, step: int, group: Mapping[str, Any]) -> "Update":
        """Those of a step counted from 1."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        root = (1 - beta2**step) ** 0.5
        decay = 1 - lr * group["weight_decay"]
        return cls(decay, lr / (1 - beta1**step), 1 / root, group["eps"], beta1, 1 - beta1, beta2, 1 - beta2)


def reference_update(
    parameter: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    update: Update,
    scale: Tensor | None,
    key: int,
    counter: tuple[int, int],
    first: int = 0,
) -> None:
    """One tensor's step in plain PyTorch, a slice at a time: what the kernel is held to, rounding by rounding.

    Of a tensor that is given in pieces `first` is where this one begins.
    """
    weights, gradients = parameter.view(-1), gradient.reshape(-1)
    for start in range(0, weights.numel(), _SLICE):
        part = slice(start, start + _SLICE)
        grad = gradients[part].float()
        grad = grad if scale is None else grad * scale
        mean, square = _moments(state, part)
        mean = mean * update.beta1 + grad * update.rest1
        square = square * update.beta2 + grad * grad * update.rest2
        # By way of fp64: on the CPU the fp32 root is a unit off for one value in five, and other machines differ.
        root = square.double().sqrt().float() * update.inverse_root + update.eps
        weight = weights[part].float() * update.kept - mean / root * update.size
        rounded = round_by_chance(weight, key, counter, first + start) if weights.dtype == torch.bfloat16 else weight
        weights[part].copy_(rounded)
        _store(state, part, mean, square)


def _moments(state: Mapping[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
    if "exp_avg" in state:
        return state["exp_avg"].view(-1)[part], state["exp_avg_sq"].view(-1)[part]
    device, blocks = state["state1"].device, slice(part.start // eight_bit.BLOCK, part.stop // eight_bit.BLOCK)
    maps = eight_bit.signed_map(device), eight_bit.unsigned_map(device)
    first, second = (
        eight_bit.dequantise(state[f"state{i}"].view(-1)[part], state[f"absmax{i}"][blocks], levels)
        for i, levels in enumerate(maps, 1)
    )
    return first, second


def _store(state: Mapping[str, Tensor], part: slice, first: Tensor, second: Tensor) -> None:
    if "exp_avg" in state:
        state["exp_avg"].view(-1)[part] = first
        state["exp_avg_sq"].view(-1)[part] = second
        return
    device, blocks = first.device, slice(part.start // eight_bit.BLOCK, part.stop // eight_bit.BLOCK)
    maps = eight_bit.signed_map(device), eight_bit.unsigned_map(device)
    for i, (values, levels) in enumerate(zip((first, second), maps, strict=True), 1):
        state[f"state{i}"].view(-1)[part], state[f"absmax{i}"][blocks] = eight_bit.quantise(values, levels)
