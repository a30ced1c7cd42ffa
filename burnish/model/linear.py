"""One linear layer: one stored weight, a bias if the checkpoint has one, and any number of named adapters."""

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Stored(Protocol):
    """What a storage offers to the layer that holds it: see `model/storage.py`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        ...

    def matmul(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """x Wᵀ in the dtype of x."""
        ...

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The weight as one dense matrix."""
        ...


class Linear(nn.Module):
    """y = x Wᵀ + b, changed by one of its adapters when the call names one.

    The adapter is an argument of the call and never a mode of the module: a mode can differ between the forward pass
    and its recomputation under activation checkpointing, which gives a silently wrong gradient.
    """

    def __init__(self, stored: nn.Module, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.bias = bias
        self.adapters = nn.ModuleDict()

    @property
    def weight(self) -> Stored:
        """The stored weight, by the interface of storages."""
        return cast(Stored, self.stored)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.weight.shape

    def forward(self, x: Float[Tensor, "... I"], adapter: str | None = None) -> Float[Tensor, "... O"]:
        """y in the dtype of x; a layer without an adapter of that name gives the plain y."""
        y = self.weight.matmul(x)
        adapters = cast(Mapping[str, nn.Module], self.adapters)
        chosen = adapters[adapter] if adapter is not None and adapter in adapters else None
        # LoRA and DoRA change x Wᵀ and leave the bias alone; IA³ rescales the finished output (`scales_bias`).
        late_bias = chosen is not None and not getattr(chosen, "scales_bias", False)
        if self.bias is not None and not late_bias:
            y = y + self.bias.to(y.dtype)
        if chosen is not None:
            y = chosen(x, y, self.stored)
        return y if self.bias is None or not late_bias else y + self.bias.to(y.dtype)
