"""How a weight is kept: trained in 32 or 16 bits, or frozen in 16, 32 or 4.

A storage is a module with `.shape`, `.dense(dtype)` and `.matmul(x)`; the dict at the foot says how to make each from a
dense weight. Frozen ones keep for the backward pass what they keep anyway, never a second, dense copy.
"""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from burnish.model.linear import Linear, Stored
from burnish.ops.linear import cast_linear
from burnish.ops.nf4 import (
    BLOCK,
    LEVELS,
    NESTED_BLOCK,
    as_float32,
    dynamic_map,
    nf4_dequantise,
    nf4_linear,
    num_blocks,
    quantise,
)

_ALIGNED = 128
"""Bytes at whose multiples parameters begin that share a block of memory: a line of the cache."""


class Encoder(Protocol):
    """Makes a storage of a dense weight."""

    def encode(self, weight: Float[Tensor, "O I"], double_quant: bool = True) -> nn.Module:
        """The weight as this storage keeps it, on the device where it is."""
        ...


class Dense(nn.Module):
    """A weight kept as it is, trained or frozen."""

    def __init__(self, weight: Float[Tensor, "O I"], trainable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.weight.shape[0], self.weight.shape[1]

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The weight in `dtype`."""
        return self.weight.to(dtype)

    def matmul(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """x Wᵀ in the dtype of x."""
        return cast_linear(x, self.weight)


@dataclass(frozen=True, slots=True)
class DenseEncoder:
    """Keeps weights in one dtype, trained or frozen."""

    dtype: torch.dtype
    trainable: bool = False

    def encode(self, weight: Float[Tensor, "O I"], double_quant: bool = True) -> Dense:
        """The weight in this dtype; it shares memory with `weight` where that has the dtype already."""
        return Dense(weight.detach().to(self.dtype), self.trainable)


class NF4(nn.Module):
    """A frozen weight in 4 bits: see `ops/nf4.py`.

    Its three parts are plain parameters of bytes, so that they shard, move and save like any other, and no
    mixed-precision policy casts the fp32 numbers among them.
    """

    def __init__(
        self,
        codes: UInt8[Tensor, " bytes"],
        scales: UInt8[Tensor, " scales"],
        nested: UInt8[Tensor, " nested"],
        shape: tuple[int, int],
    ) -> None:
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.nested = nn.Parameter(nested, requires_grad=False)
        self.shape = shape

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and nested scales, as `ops/nf4.py` takes them."""
        return self.codes, self.scales, self.nested

    @classmethod
    def encode(cls, weight: Float[Tensor, "O I"], double_quant: bool = True) -> "NF4":
        """The weight in 4 bits, its scales in 8 bits with `double_quant`, else in 32.

        Raises ValueError for a weight that holds NaN or infinity.
        """
        return cls(*quantise(weight, double_quant), (weight.shape[0], weight.shape[1]))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The weight that the codes stand for: computed in fp32, rounded once to `dtype`."""
        return nf4_dequantise(self.codes, self.scales, self.nested, *self.shape, dtype)

    def matmul(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """x Wᵀ in the dtype of x; the backward pass dequantises again."""
        return nf4_linear(x, self.codes, self.scales, self.nested, self.shape[0])

    def to_bitsandbytes(self, name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The tensors under which a bitsandbytes checkpoint holds the layer called `name`.

        `dtype` is what `transformers` dequantises to.
        """
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch.")}
        state["shape"] = list(self.shape)
        device = self.codes.device
        parts = {"quant_map": torch.tensor(LEVELS, device=device)}
        if self.nested.numel():
            values = as_float32(self.nested.data)
            parts["absmax"] = self.scales.data
            parts["nested_absmax"] = values[:-1].clone()
            parts["nested_quant_map"] = dynamic_map().to(device)
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(values[-1])}
        else:
            parts["absmax"] = as_float32(self.scales.data)
        parts["quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        key = f"{name}.weight"
        return {key: self.codes.data.unsqueeze(1)} | {f"{key}.{part}": tensor for part, tensor in parts.items()}

    @classmethod
    def from_bitsandbytes(cls, name: str, tensors: Mapping[str, Tensor]) -> "NF4":
        """The layer called `name` of a bitsandbytes checkpoint, bit for bit.

        Raises ValueError naming the tensor that is missing, misshapen or of another format than NF4 in blocks of 64.
        """
        key = f"{name}.weight"
        state = _quant_state(f"{key}.quant_state.bitsandbytes__nf4", tensors)
        rows, columns = state["shape"]
        blocks = num_blocks(rows * columns)
        codes = _bytes(tensors, key, (rows * columns + 1) // 2)
        _agree(tensors, f"{key}.quant_map", torch.tensor(LEVELS))
        if f"{key}.nested_absmax" not in tensors:
            return cls(codes, _bytes(tensors, f"{key}.absmax", 4 * blocks), codes.new_empty(0), (rows, columns))
        _agree(tensors, f"{key}.nested_quant_map", dynamic_map())
        scales = _bytes(tensors, f"{key}.absmax", blocks)
        nested = _bytes(tensors, f"{key}.nested_absmax", 4 * -(-blocks // NESTED_BLOCK))
        mean = torch.tensor([float(state["nested_offset"])]).view(torch.uint8)
        return cls(codes, scales, torch.cat([nested, mean.to(nested.device)]), (rows, columns))


def _quant_state(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What bitsandbytes writes beside the numbers, checked: JSON in a tensor of bytes."""
    if key not in tensors:
        raise ValueError(f"{key} is missing: the checkpoint is no bitsandbytes NF4 checkpoint")
    try:
        state = json.loads(bytes(tensors[key].tolist()))
    except ValueError:
        raise ValueError(f"{key} is not JSON: the checkpoint is damaged") from None
    wanted = {"quant_type": "nf4", "blocksize": BLOCK, "nested_blocksize": NESTED_BLOCK}
    for option, value in wanted.items():
        if state.get(option, value) != value:
            raise ValueError(f"{key} has {option}={state[option]}; only {option}={value} can be read")
    if len(state.get("shape") or ()) != 2:
        raise ValueError(f"{key} gives the shape {state.get('shape')}; only matrices can be read")
    return state


def _bytes(tensors: Mapping[str, Tensor], key: str, count: int) -> Tensor:
    """The tensor as a vector of `count` bytes, whatever dtype it was packed in."""
    if key not in tensors:
        raise ValueError(f"{key} is missing from the checkpoint")
    raw = tensors[key].detach().reshape(-1).contiguous().view(torch.uint8)
    if raw.numel() != count:
        raise ValueError(f"{key} holds {raw.numel()} bytes where its shape asks for {count}")
    return raw


def _agree(tensors: Mapping[str, Tensor], key: str, levels: Tensor) -> None:
    if not torch.equal(_bytes(tensors, key, 4 * levels.numel()).cpu(), levels.view(torch.uint8)):
        raise ValueError(f"{key} is another table of levels than bitsandbytes' own, which alone can be read")


def lay_in_one_piece(module: nn.Module) -> None:
    """Move all parameters of a module into one block of memory: matrices first, then vectors, each in their order.

    What stays for good then leaves no gaps between what was needed while it was read, and matrices lie end to end where
    their bytes are multiples of 128. Whoever keeps one of them keeps the block.
    """
    parameters = sorted(module.parameters(), key=lambda parameter: -parameter.ndim)
    if not parameters or any(parameter.is_meta for parameter in parameters):
        return
    ends = list(accumulate(-(-parameter.nbytes // _ALIGNED) * _ALIGNED for parameter in parameters))
    device = parameters[0].device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else it may be cut out of memory that is only for the moment in one piece
    whole = torch.empty(ends[-1], dtype=torch.uint8, device=device)
    for parameter, start in zip(parameters, [0, *ends], strict=False):
        place = whole[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.data)


class _Scratch(nn.Module):
    """A weight turned into one dtype for a while, beside the storage that it came from."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = stored
        self.weight: Tensor
        self.register_buffer("weight", stored.dense(dtype), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.stored.shape

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The weight in `dtype`, rounded from what is stored."""
        return self.weight if dtype == self.weight.dtype else self.stored.dense(dtype)

    def matmul(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """x Wᵀ in the dtype of x."""
        return F.linear(x, self.weight) if x.dtype == self.weight.dtype else self.stored.matmul(x)


@contextmanager
def densified(model: nn.Module, dtype: torch.dtype | None) -> Generator[None]:
    """Every weight that is kept otherwise is at hand in `dtype` inside; None leaves all as they are.

    Layers compute the very numbers that they compute without, and no gradient reaches a weight: for decoding, where
    each step would dequantise or cast all weights again.
    """
    layers = [] if dtype is None else list(_kept_otherwise(model, dtype))
    stored = [layer.stored for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                assert dtype is not None
                layer.stored = _Scratch(layer.weight, dtype)
        yield
    finally:
        for layer, original in zip(layers, stored, strict=True):
            layer.stored = original


def scratch_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """The memory that `densified` takes."""
    return sum(layer.shape[0] * layer.shape[1] * dtype.itemsize for layer in _kept_otherwise(model, dtype))


def _kept_otherwise(model: nn.Module, dtype: torch.dtype) -> Iterator[Linear]:
    for module in model.modules():
        if isinstance(module, Linear):
            stored = module.stored
            if not isinstance(stored, Dense | _Scratch) or stored.weight.dtype != dtype:
                yield module


STORAGES: dict[str, Encoder] = {
    "full": DenseEncoder(torch.float32, trainable=True),
    "full16": DenseEncoder(torch.bfloat16, trainable=True),
    "bf16": DenseEncoder(torch.bfloat16),
    "fp32": DenseEncoder(torch.float32),
    "nf4": NF4,
}
"""What `model.storage` names."""
