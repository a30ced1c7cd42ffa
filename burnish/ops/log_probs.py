"""The log-probability of each target, without ever holding all logits."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from burnish.ops.pointwise import soft_cap

CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Logits held at a time, in numbers: 8 MiB fits a CPU's cache, 128 MiB keeps a GPU busy."""


def target_log_probs(
    hidden_KD: Float[Tensor, "K D"],
    head_VD: Float[Tensor, "V D"],
    targets_K: Int[Tensor, " K"],
    softcap: float | None = None,
) -> tuple[Float[Tensor, " K"], Bool[Tensor, " K"]]:
    """(log softmax(z)[target], argmax z == target) in fp32, where z = soft_cap(hidden · headᵀ).

    Rows go through in chunks, so that [K, V] never exists. With g the gradient that arrives and p = softmax(z),

        ∂/∂z = g · (onehot(target) - p),   ∂/∂hidden = (∂/∂z · z') head,   ∂/∂head = (∂/∂z · z')ᵀ hidden,

    z' = 1 - (z / cap)². When the head is frozen the gradient of the hidden states is made, for g = 1, while the logits
    are at hand; when it is trained, g is needed first and the backward pass computes the logits again.
    """
    log_probs, correct = _TargetLogProbs.apply(hidden_KD, head_VD, targets_K, softcap, torch.is_grad_enabled())
    return log_probs, correct


def chunk_rows(num_rows: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Slices of the rows such that the logits of one fit the budget."""
    size = max(1, CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]) // vocab_size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def head_logits(
    hidden_KD: Float[Tensor, "K D"], head_VD: Float[Tensor, "V D"], softcap: float | None = None
) -> Float[Tensor, "K V"]:
    """The logits of a few rows, in fp32 (float64 for float64)."""
    half = hidden_KD.dtype in (torch.bfloat16, torch.float16)
    if half and hidden_KD.device.type == "cuda" and not torch.is_grad_enabled():
        # The sums come out of the matmul unrounded; PyTorch has no gradient for this form.
        logits = torch.mm(hidden_KD, head_VD.T, out_dtype=torch.float32)
    else:
        logits = hidden_KD @ head_VD.T
        logits = logits if logits.dtype == torch.float64 else logits.float()
    return soft_cap(logits, softcap)


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, recording: bool
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_head = (recording and wanted for wanted in ctx.needs_input_grad[:2])
        log_probs: list[Tensor] = []
        correct: list[Tensor] = []
        unit_gradients: list[Tensor] = []
        for rows in chunk_rows(hidden.shape[0], head.shape[0], hidden.device):
            logits = head_logits(hidden[rows], head, softcap)
            chosen = logits.gather(1, targets[rows, None])
            total = logits.logsumexp(1, keepdim=True)
            log_probs.append((chosen - total)[:, 0])
            correct.append(logits.argmax(1) == targets[rows])
            if wants_hidden and not wants_head:
                unit = _logit_gradient(logits, total, targets[rows], softcap)
                unit_gradients.append(unit.to(head.dtype) @ head)
        empty = hidden.new_zeros(0, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        ctx.softcap, ctx.wants_head = softcap, wants_head
        if wants_head:
            ctx.save_for_backward(hidden, head, targets)
        elif wants_hidden:
            ctx.save_for_backward(torch.cat([hidden[:0], *unit_gradients]))
        out = torch.cat([empty, *log_probs]), torch.cat([targets[:0].bool(), *correct])
        ctx.mark_non_differentiable(out[1])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        g = grads[0]
        if not ctx.wants_head:
            (unit,) = ctx.saved_tensors
            return (unit * g[:, None]).to(unit.dtype), None, None, None, None
        hidden, head, targets = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        # Summed over many chunks: in bf16 the later ones would be rounded away.
        head_grad = torch.zeros_like(head, dtype=grads[0].dtype)
        for rows in chunk_rows(hidden.shape[0], head.shape[0], hidden.device):
            logits = head_logits(hidden[rows], head, ctx.softcap)
            total = logits.logsumexp(1, keepdim=True)
            dz = _logit_gradient(logits, total, targets[rows], ctx.softcap).mul_(g[rows, None]).to(head.dtype)
            hidden_grad[rows] = dz @ head
            head_grad += dz.T @ hidden[rows]
        return hidden_grad, head_grad.to(head.dtype), None, None, None


def _logit_gradient(logits: Tensor, total: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """(onehot(target) - softmax(z)) · z', in the memory of the logits unless they are soft-capped."""
    slope = None if softcap is None else 1 - (logits / softcap) ** 2
    gradient = logits.sub_(total).exp_().neg_()
    gradient.scatter_add_(1, targets[:, None], torch.ones_like(gradient[:, :1]))
    return gradient if slope is None else gradient.mul_(slope)
