"""Linear layers that read the same input, as one matrix: q, k and v; gate and up."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from burnish.model.linear import Linear
from burnish.model.storage import NF4, Dense
from burnish.ops.fp8 import FP8, dense_to_fp8, nf4_to_fp8, nf4_weight_scale, weight_scale
from burnish.ops.nf4 import dequantise


class Joint:
    """Layers one below the other, so that one matmul serves them all.

    Dense weights that lie side by side, as `storage.lay_in_one_piece` leaves them, are used where they are; others are
    written into fresh memory for each use, which is free again when the product is done.
    """

    def __init__(self, layers: Sequence[Linear], parts: Sequence[int] = ()) -> None:
        self.layers = list(layers)
        self.widths = [layer.shape[0] for layer in layers]
        self.parts = list(parts) or self.widths
        """How wide the outputs are that mean different things: of each layer, or `parts` of one that gives them all."""
        self.shape = (sum(self.widths), layers[0].shape[1])
        self.hold = False
        """Whether to keep the weight as it was last multiplied with, for the next time."""
        self._held: dict[torch.dtype | bool, Tensor] = {}
        self._row_scale: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """The biases end to end; None where there is none."""
        biases = [layer.bias for layer in self.layers]
        return None if biases[0] is None else torch.cat([cast(Tensor, bias).detach() for bias in biases])

    @property
    def weights(self) -> list[nn.Parameter | None]:
        """The weight of each layer where it can be trained, else None."""
        return [layer.stored.weight if isinstance(layer.stored, Dense) else None for layer in self.layers]

    @property
    def held(self) -> list[Tensor]:
        """What is kept of the weight besides the weight itself."""
        return [*self._held.values(), *([] if self._row_scale is None else [self._row_scale])]

    @contextmanager
    def decoded(self, wanted: bool) -> Generator[None]:
        """Where `wanted`, the weight is decoded once for all products in the `with` block."""
        before, self.hold = self.hold, self.hold or wanted
        try:
            yield
        finally:
            self.hold = before
            if wanted and not before:
                self._held.clear()

    def release(self) -> None:
        """Let go of what is held."""
        self._held.clear()

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The joint weight in `dtype`."""
        return self._kept(dtype, lambda: self._dense(dtype))

    def fp8(self, transposed: bool) -> Float[Tensor, "O I"] | Float[Tensor, "I O"]:
        """The joint weight divided by `row_scale` in 8 bits, [O, I] or transposed: contiguous either way."""
        return self._kept(transposed, lambda: self._fp8(transposed))

    def _kept(self, key: torch.dtype | bool, make: Callable[[], Tensor]) -> Tensor:
        if not self.hold:
            return make()
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    def _dense(self, dtype: torch.dtype) -> Tensor:
        stored = [layer.stored for layer in self.layers]
        if all(isinstance(part, Dense) and part.weight.dtype == dtype for part in stored):
            joined = _joined([cast(Dense, part).weight.detach() for part in stored])
            if joined is not None:
                return joined
        weight = torch.empty(self.shape, dtype=dtype, device=next(stored[0].parameters()).device)
        for layer, rows in zip(self.layers, weight.split(self.widths), strict=True):
            if isinstance(layer.stored, NF4):
                codes, scales, nested = layer.stored.parts
                dequantise(codes, scales, nested, layer.shape, dtype, out=rows)
            else:
                rows.copy_(layer.weight.dense(dtype))
        return weight

    def row_scale(self) -> Float[Tensor, " O"]:
        """What each row is divided by for 8 bits: found once, since the weights are frozen."""
        if self._row_scale is None:
            scales = [
                nf4_weight_scale(*layer.stored.parts, layer.shape)
                if isinstance(layer.stored, NF4)
                else weight_scale(layer.weight.dense(torch.bfloat16))
                for layer in self.layers
            ]
            self._row_scale = torch.cat(scales)
        return self._row_scale

    def _fp8(self, transposed: bool) -> Tensor:
        shape = self.shape[::-1] if transposed else self.shape
        scale = self.row_scale()
        weight = torch.empty(shape, dtype=FP8, device=scale.device)
        pieces = weight.split(self.widths, dim=1 if transposed else 0)
        for layer, piece, rows in zip(self.layers, pieces, scale.split(self.widths), strict=True):
            if isinstance(layer.stored, NF4):
                nf4_to_fp8(*layer.stored.parts, layer.shape, rows, transposed, out=piece)
            else:
                dense_to_fp8(layer.weight.dense(torch.bfloat16), rows, transposed, out=piece)
        return weight


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """Weights that lie one after the other in memory as one tensor; None where they do not."""
    first = weights[0]
    end = first.storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.storage_offset() != end or not weight.is_contiguous():
            return None
        end += weight.numel()
    rows = sum(len(weight) for weight in weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())
