"""The gradients of what a joint layer owns: its factors, its weights where they train, and its biases."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from burnish.model.adapters import LoRA
from burnish.model.factors import Factors, Pair
from burnish.model.joint import Joint
from burnish.ops.add_norm import Gain, norm_again
from burnish.ops.outer import outer


class Read(NamedTuple):
    """What a joint layer read: rows as they are, or what a norm makes of the stream."""

    rows: Tensor
    rstd: Tensor | None = None
    """Of the norm; None: there is none in between."""
    gain: Gain | None = None

    def normed(self) -> Tensor:
        """The rows that were multiplied, made again bit for bit."""
        if self.rstd is None or self.gain is None:
            return self.rows
        h = norm_again(self.rows, self.rstd, self.gain, False)[0]
        assert h is not None
        return h

    def gradient_A(self, dlow: Tensor) -> Tensor:
        """dlowᵀ h in fp32. With h = x · rstd · gain that is (dlow · rstd)ᵀ x · gain, so h need not be made."""
        if self.rstd is None or self.gain is None:
            return _product(dlow.T, self.rows, torch.float32)
        scaled = (dlow * self.rstd.unsqueeze(1)).to(dlow.dtype)
        return _product(scaled.T, self.rows, torch.float32) * (self.gain.weight.float() + self.gain.offset)


class Low(NamedTuple):
    """The middle of LoRA in a joint layer."""

    values: Tensor
    """What the layer read, times A."""
    gradient: Tensor
    """The gradient of its output, times B."""


@dataclass
class Taking:
    """Whether gradients of matrices are taken as soon as they are complete, so that they never exist together."""

    wanted: bool = False
    """Whether memory demands it."""
    passes: int = 0
    """Passes with gradients that there were: gradients are complete where a micro-batch makes one, in its turn."""
    take: Callable[[nn.Parameter], None] | None = None
    """Takes `.grad`, whose memory is free then, and may change the weight, which the pass needs no more."""
    noted: Callable[[Tensor], None] | None = None
    """Sees each gradient before it is taken."""

    @contextmanager
    def by(self, take: Callable[[nn.Parameter], None] | None) -> Generator[None]:
        """Backward passes in the `with` block have their gradients taken; None: they go to `.grad`."""
        self.take = take
        try:
            yield
        finally:
            self.take = None


class LayerGradients:
    """The gradients of parameters, by their ids. What comes for one parameter twice, tile after tile, is added up.

    Those of matrices that are taken are handed over when the next layer's are made: the pass has multiplied with the
    weight by then.
    """

    def __init__(self, factors: Factors | None) -> None:
        self._factors = factors
        self.found: dict[int, Tensor] = {}
        self.taking: Taking | None = None
        self._complete: list[nn.Parameter] = []

    def put(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """A gradient of this parameter."""
        known = self.found.get(id(parameter))
        self.found[id(parameter)] = gradient if known is None else known.add_(gradient)

    def collect(self, joint: Joint, pair: Pair | None, dy: Tensor, read: Read, low: Low | None) -> None:
        """The gradients of a joint layer's own parameters, from that of its output."""
        self._hand_over()
        if is_trained(joint):
            weights = cast(list[nn.Parameter], joint.weights)
            dW = _product(dy.T, read.normed(), weights[0].dtype)
            for weight, rows in zip(weights, dW.split(joint.widths), strict=True):
                self._give(weight, rows)
        for layer, columns in zip(joint.layers, dy.split(joint.widths, dim=1), strict=True):
            if layer.bias is not None and layer.bias.requires_grad:
                self.put(layer.bias, columns.sum(0, dtype=torch.float32).to(layer.bias.dtype))
        if pair is None:
            return
        assert self._factors is not None
        assert low is not None
        rank, times = self._factors.rank, len(joint.parts) // len(joint.layers)
        dA = read.gradient_A(low.gradient)
        if times > 1:  # what one layer's A gave to each of its parts
            dA = dA.unflatten(0, (-1, times, rank)).sum(1).flatten(0, 1)
        dB = outer(dy, low.values, joint.parts)
        for layer, rows_A, rows_B in zip(joint.layers, dA.split(rank), dB.split(joint.widths), strict=True):
            if self._factors.name in layer.adapters:
                lora = cast(LoRA, layer.adapters[self._factors.name])
                self.put(lora.A, rows_A[: lora.rank].to(lora.A.dtype))
                self.put(lora.B, rows_B[:, : lora.rank].to(lora.B.dtype))

    def finish(self) -> None:
        """When all are there, multiply the gradients of B with s: passes know only s · B."""
        self._hand_over()
        if self._factors is None:
            return
        B = self._factors.parameters[1::2]
        found = [(self.found[id(b)], s) for b, s in zip(B, self._factors.scales, strict=True)]
        torch._foreach_mul_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            [gradient for gradient, _ in found], [scale for _, scale in found]
        )

    def _give(self, weight: nn.Parameter, gradient: Tensor) -> None:
        """A large gradient: what later micro-batches add goes to `.grad` at once, so that no second copy waits."""
        if weight.grad is not None:
            weight.grad.add_(gradient)
        elif self.taking is None or self.taking.take is None:
            self.put(weight, gradient)
        else:
            weight.grad = gradient
            self._complete.append(weight)
            if self.taking.noted is not None:
                self.taking.noted(gradient)

    def _hand_over(self) -> None:
        for weight in self._complete:
            assert self.taking is not None
            assert self.taking.take is not None
            self.taking.take(weight)
        self._complete.clear()


def is_trained(joint: Joint) -> bool:
    """Whether its weights get a gradient: all of them, or none."""
    trained = {weight is not None and weight.requires_grad for weight in joint.weights}
    assert len(trained) == 1
    return trained.pop()


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, which half precision on a GPU reaches unrounded."""
    if left.dtype == dtype or not left.is_cuda or dtype != torch.float32:
        return (left @ right).to(dtype)
    return torch.mm(left, right, out_dtype=torch.float32)
