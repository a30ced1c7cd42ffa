"""x times a transposed weight kept in another dtype than x, without a copy of the weight held until the backward pass.

`F.linear(x, weight.to(x.dtype))` would keep that copy alive for the gradient: the whole model once more in 16 bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def cast_linear(x: Float[Tensor, "*T I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*T O"]:
    """x @ weight.T in the dtype of x; both may need gradients, each in its own dtype."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight)
    return _cast_linear(x, weight)


@torch.library.custom_op("burnish::cast_linear", mutates_args=())
def _cast_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


@torch.library.custom_op("burnish::cast_linear_backward_x", mutates_args=())
def _backward_x(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight.to(grad.dtype)


@_cast_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_backward_x.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, weight = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    grad_x = None if weight is None else _backward_x(grad, weight)
    if x is None:
        return grad_x, None
    return grad_x, (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(ctx.weight_dtype)


_cast_linear.register_autograd(_backward, setup_context=_keep)
