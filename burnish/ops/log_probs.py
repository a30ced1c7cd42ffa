"""The log-probability of each target, without ever holding all logits."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from burnish.ops import runs_kernels
from burnish.ops.pointwise import soft_cap

CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits held at a time: 8 MiB fits a CPU's cache, 256 MiB keeps a GPU's matmuls large at any vocabulary."""

_TILE = 128
"""Rows of a chunk come in whole tiles of a matmul, as long as one fits."""


def target_log_probs(
    hidden_KD: Float[Tensor, "K D"],
    head_VD: Float[Tensor, "V D"],
    targets_K: Int[Tensor, " K"],
    softcap: float | None = None,
    chunk_logits: int | None = None,
) -> tuple[Float[Tensor, " K"], Bool[Tensor, " K"]]:
    """(log softmax(z)[target], argmax z == target) in fp32, where z = soft_cap(hidden · headᵀ).

    `chunk_logits` is how many logits exist at a time, None: CHUNK_LOGITS. With g the gradient that arrives and
    p = softmax(z),

        ∂/∂z = g · (onehot(target) - p),   ∂/∂hidden = (∂/∂z · z') head,   ∂/∂head = (∂/∂z · z')ᵀ hidden,

    z' = 1 - (z / cap)². When the head is frozen the gradient of the hidden states is made, for g = 1, while the logits
    of a few rows are at hand; the backward pass only scales it. When the head is trained, g is needed first: the
    backward pass computes the logits again, for all rows and a slice of the vocabulary at a time, so that each row of
    the head's gradient is one sum over all positions and is rounded once.
    """
    options = _Options(softcap, chunk_logits, torch.is_grad_enabled())
    log_probs, correct = _TargetLogProbs.apply(hidden_KD, head_VD, targets_K, options)
    return log_probs, correct


def chunk_rows(num_rows: int, row_size: int, device: torch.device, chunk_logits: int | None = None) -> list[slice]:
    """Slices of the rows such that the logits of one, `row_size` for each row, fit the budget."""
    budget = CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]) if chunk_logits is None else chunk_logits
    size = max(1, budget // max(1, row_size))
    size -= size % _TILE if size > _TILE else 0
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def head_logits(
    hidden_KD: Float[Tensor, "K D"], head_VD: Float[Tensor, "V D"], softcap: float | None = None
) -> Float[Tensor, "K V"]:
    """The logits of a few rows, in fp32 (float64 for float64)."""
    return soft_cap(_matmul(hidden_KD, head_VD), softcap)


class Rows(NamedTuple):
    """What rows of logits say about their targets."""

    log_probs: Float[Tensor, " K"]
    totals: Float[Tensor, " K"]
    """log Σ exp z."""
    correct: Bool[Tensor, " K"]
    gradient: Float[Tensor, "K V"] | None
    """(onehot(target) - softmax(z)) · z', where it was asked for."""


def read_rows(
    logits_KV: Float[Tensor, "K V"],
    targets_K: Int[Tensor, " K"],
    softcap: float | None,
    dtype: torch.dtype,
    wants_gradient: bool = True,
) -> Rows:
    """What the logits, not yet capped, say; their gradient, in `dtype`, where it is wanted.

    The gradient may lie in the memory of the logits: they are used up. The rest is the same to the last bit with it and
    without, so that what a policy says of its own answers does not depend on whether it learns from them.
    """
    if _has_kernel(logits_KV):
        from burnish.kernels import head

        return Rows(*head.read_rows(logits_KV, targets_K, softcap, dtype, wants_gradient))
    z = soft_cap(logits_KV, softcap)
    chosen = z.gather(1, targets_K[:, None])
    totals = z.logsumexp(1, keepdim=True)
    correct = z.argmax(1) == targets_K
    gradient = _slope(z, targets_K, totals, softcap).to(dtype) if wants_gradient else None
    return Rows((chosen - totals)[:, 0], totals[:, 0], correct, gradient)


class Reading(NamedTuple):
    """What the forward pass found of each row, and the gradient that arrived for it."""

    targets_K: Int[Tensor, " K"]
    totals_K: Float[Tensor, " K"]
    gradient_K: Float[Tensor, " K"]


def logit_gradient(
    logits_KV: Float[Tensor, "K V"], reading: Reading, first: int, softcap: float | None, dtype: torch.dtype
) -> Float[Tensor, "K V"]:
    """g · (onehot(target) - softmax(z)) · z' for the columns from `first` on of logits not yet capped: used up too."""
    if _has_kernel(logits_KV):
        from burnish.kernels import head

        return head.logit_gradient(logits_KV, *reading, first, softcap, dtype)
    z = soft_cap(logits_KV, softcap)
    gradient = _slope(z, reading.targets_K - first, reading.totals_K[:, None], softcap)
    return gradient.mul_(reading.gradient_K[:, None]).to(dtype)


class _Options(NamedTuple):
    softcap: float | None
    chunk_logits: int | None
    recording: bool


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_head = (options.recording and wanted for wanted in ctx.needs_input_grad[:2])
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        log_probs, totals = (hidden.new_empty(len(targets), dtype=exact) for _ in range(2))
        correct = torch.empty_like(targets, dtype=torch.bool)
        unit = torch.empty_like(hidden) if wants_hidden and not wants_head else None
        for rows in chunk_rows(len(targets), head.shape[0], hidden.device, options.chunk_logits):
            logits = _matmul(hidden[rows], head)
            read = read_rows(logits, targets[rows], options.softcap, hidden.dtype, unit is not None)
            log_probs[rows], totals[rows], correct[rows] = read.log_probs, read.totals, read.correct
            if unit is not None and read.gradient is not None:
                torch.mm(read.gradient, head, out=unit[rows])
            del logits, read  # before the next chunk is made
        ctx.options, ctx.wants_head = options, wants_head
        if wants_head:
            ctx.save_for_backward(hidden, head, targets, totals)
        elif unit is not None:
            ctx.save_for_backward(unit)
        ctx.mark_non_differentiable(correct)
        return log_probs, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.wants_head:
            hidden, head, targets, totals = ctx.saved_tensors
            reading = Reading(targets, totals, grads[0].contiguous())
            return (*_both_gradients(hidden, head, reading, ctx.options, ctx.needs_input_grad[0]), None, None)
        (unit,) = ctx.saved_tensors
        # Straight into its dtype: the product in the wider one never exists.
        return torch.mul(unit, grads[0][:, None], out=torch.empty_like(unit)), None, None, None


def _both_gradients(
    hidden: Tensor, head: Tensor, reading: Reading, options: _Options, wants_hidden: bool
) -> tuple[Tensor | None, Tensor]:
    head_grad = torch.empty_like(head)
    # Summed over the slices of the vocabulary: in bf16 the later ones would be rounded away.
    hidden_grad = torch.zeros_like(hidden, dtype=reading.totals_K.dtype) if wants_hidden else None
    for part in chunk_rows(head.shape[0], hidden.shape[0], hidden.device, options.chunk_logits):
        logits = _matmul(hidden, head[part])
        dz = logit_gradient(logits, reading, part.start, options.softcap, head.dtype)
        torch.mm(dz.T, hidden, out=head_grad[part])
        if hidden_grad is not None:
            _add_matmul(hidden_grad, dz, head[part])
        del logits, dz  # before the next slice is made
    return None if hidden_grad is None else hidden_grad.to(hidden.dtype), head_grad


def _matmul(hidden: Tensor, head: Tensor) -> Tensor:
    if _is_half_on_cuda(hidden) and not torch.is_grad_enabled():
        # The sums come out of the matmul unrounded; PyTorch has no gradient for this form.
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    logits = hidden @ head.T
    return logits if logits.dtype == torch.float64 else logits.float()


def _add_matmul(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x y, unrounded where the device can."""
    if _is_half_on_cuda(x):
        torch.addmm(total, x, y, out_dtype=total.dtype, out=total)
    elif x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += x @ y


def _has_kernel(logits: Tensor) -> bool:
    return logits.dtype == torch.float32 and runs_kernels(logits.device)


def _is_half_on_cuda(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _slope(z: Tensor, targets: Tensor, totals: Tensor, softcap: float | None) -> Tensor:
    """(onehot(target) - softmax(z)) · z', in the memory of z; a target beyond the columns of z is not there."""
    slope = None if softcap is None else 1 - (z / softcap) ** 2
    gradient = z.sub_(totals).exp_().neg_()
    inside = (targets >= 0) & (targets < z.shape[1])
    gradient.scatter_add_(1, targets.clamp(0, z.shape[1] - 1)[:, None], inside[:, None].to(z.dtype))
    return gradient if slope is None else gradient.mul_(slope)
