"""Heads that read one number from each position: rewards and values."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ScalarHead(nn.Module):
    """w · h + b in fp32, where h is the last hidden state of a position."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
        """The number of each position."""
        return F.linear(hidden_TD.to(self.weight.dtype), self.weight, self.bias)[:, 0]


def add_head(model: nn.Module, name: str, width: int, generator: torch.Generator | None = None) -> ScalarHead:
    """A new head of the model: weights drawn from N(0, 1 / (width + 1)), no bias (Ziegler et al. 2019, their code).

    With that deviation the first scores of normed hidden states have a variance near 1. Raises ValueError for a name
    that is taken.
    """
    heads = cast(nn.ModuleDict, model.heads)
    if name in heads:
        raise ValueError(f"the model already has a head '{name}'")
    head = ScalarHead(width)
    head.weight.data.normal_(0.0, (width + 1) ** -0.5, generator=generator)
    heads[name] = head.to(model.get_parameter("model.norm.weight").device)
    return head


def head_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """A head's parameters, by their names in the model."""
    head = cast(nn.ModuleDict, model.heads)[name]
    return {f"heads.{name}.{key}": parameter for key, parameter in head.named_parameters()}
