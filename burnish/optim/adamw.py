"""AdamW with 32-bit states, one fused kernel over all parameters, and its state as named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def adamw(
    parameters: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the parameters (Loshchilov and Hutter 2019); only matrices decay, not gains, biases or scales.

    All parameters are fp32, so the states are as well. The order of `parameters` is the order of the state.
    """
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as `parameter.state` -> tensor: what a checkpoint stores."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put a stored state back, on each parameter's own device; the step counter stays where AdamW keeps it."""
    for name, parameter in parameters.items():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors]
        optimizer.state[parameter] = {key: tensors[f"{name}.{key}"].to(parameter.device) for key in keys}
