"""The decoder block: attention and MLP, with norms where the family has them.

Module names are those of Hugging Face checkpoints, so that weights and adapters need no renaming.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from burnish.model.cache import Cache
from burnish.model.families import DecoderConfig
from burnish.model.linear import Linear
from burnish.ops.attention import Layout, attention, cached_attention, rotate
from burnish.ops.gather import gather_rows
from burnish.ops.pointwise import gated, rms_norm
from burnish.ops.rope import Table

Attend = Callable[[Tensor, Tensor, Tensor, Layout, float, int | None, float | None], Tensor]
"""`ops.attention.attention`, or the same kept out of compiled graphs."""


class Weights(Protocol):
    """Where a decoder gets its weights: a checkpoint, or chance. It is asked once for each, in the order of layers."""

    def linear(self, path: str, shape: tuple[int, int], bias: bool) -> Linear:
        """The linear layer with this module path and (outputs, inputs)."""
        ...

    def parameter(self, path: str, shape: tuple[int, ...]) -> nn.Parameter:
        """The embedding matrix or norm weight with this parameter path."""
        ...


class Pass(NamedTuple):
    """What the blocks share in one forward pass."""

    tables: tuple[Table, ...]
    """One for each of `DecoderConfig.ropes`."""
    layout: Layout | None
    """Where packed sequences stand; None: one new token for each slot of the cache."""
    cache: Cache | None = None


class Embedding(nn.Module):
    """The vector of each token, times a factor."""

    def __init__(self, weight: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale

    def forward(self, tokens_T: Int[Tensor, " T"], dtype: torch.dtype) -> Float[Tensor, "T D"]:
        """The vectors in `dtype`."""
        hidden_TD = gather_rows(self.weight, tokens_T).to(dtype)
        # Gemma's factor is rounded to the dtype of activations, as it was in training.
        return hidden_TD if self.scale == 1 else hidden_TD * torch.tensor(self.scale, dtype=dtype)

    def to_host(self) -> None:
        """Move the frozen table to the host, pinned where the device is CUDA's: `gather_rows` reads it from there."""
        assert not self.weight.requires_grad
        self.weight.data = self.weight.data.cpu().pin_memory() if self.weight.is_cuda else self.weight.data.cpu()


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self, weight: nn.Parameter, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = weight
        self.eps = config.norm_eps
        self.offset = config.norm_offset

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """x / rms(x) · weight in the dtype of x."""
        return rms_norm(x, self.weight, self.eps, self.offset)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, index: int, path: str, weights: Weights) -> None:
        super().__init__()
        self.index = index
        self.window, self.rope = config.layers[index].window, config.layers[index].rope
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        self.attend: Attend = attention
        width = config.hidden_size
        num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.widths = (num_q, num_kv, num_kv)
        if config.fused:
            self.qkv_proj = weights.linear(f"{path}.qkv_proj", (sum(self.widths), width), config.qkv_bias)
        else:
            self.q_proj = weights.linear(f"{path}.q_proj", (num_q, width), config.qkv_bias)
            self.k_proj = weights.linear(f"{path}.k_proj", (num_kv, width), config.qkv_bias)
            self.v_proj = weights.linear(f"{path}.v_proj", (num_kv, width), config.qkv_bias)
        self.o_proj = weights.linear(f"{path}.o_proj", (width, num_q), config.output_bias)
        if self.qk_norm != "none":
            sizes = (num_q, num_kv) if self.qk_norm == "full" else (config.head_dim, config.head_dim)
            self.q_norm = Norm(weights.parameter(f"{path}.q_norm.weight", (sizes[0],)), config)
            self.k_norm = Norm(weights.parameter(f"{path}.k_norm.weight", (sizes[1],)), config)
        self.fused = config.fused

    def forward(self, x_TD: Float[Tensor, "T D"], given: Pass, adapter: str | None) -> Float[Tensor, "T D"]:
        """What each position gathers from its sequence."""
        q, k, v = self._project(x_TD, adapter)
        if self.rope is not None:
            q, k = rotate(q, given.tables[self.rope]), rotate(k, given.tables[self.rope])
        if given.cache is not None:
            given.cache.store(self.index, k, v)
        if given.layout is not None:
            out_THC = self.attend(q, k, v, given.layout, self.scale, self.window, self.softcap)
        else:
            assert given.cache is not None
            held_k, held_v, seen = given.cache.held(self.index, self.window)
            out_THC = cached_attention(q, held_k, held_v, seen, self.scale, self.softcap)
        return self.o_proj(out_THC.flatten(1), adapter)

    def _project(self, x_TD: Tensor, adapter: str | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused:
            q, k, v = self.qkv_proj(x_TD, adapter).split(self.widths, dim=-1)
        else:
            q, k, v = self.q_proj(x_TD, adapter), self.k_proj(x_TD, adapter), self.v_proj(x_TD, adapter)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class MLP(nn.Module):
    """A gated MLP: down(activation(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig, path: str, weights: Weights) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        if config.fused:
            self.gate_up_proj = weights.linear(f"{path}.gate_up_proj", (2 * inner, width), config.mlp_bias)
        else:
            self.gate_proj = weights.linear(f"{path}.gate_proj", (inner, width), config.mlp_bias)
            self.up_proj = weights.linear(f"{path}.up_proj", (inner, width), config.mlp_bias)
        self.down_proj = weights.linear(f"{path}.down_proj", (width, inner), config.mlp_bias)
        self.fused, self.activation = config.fused, config.activation

    def forward(self, x_TD: Float[Tensor, "T D"], adapter: str | None) -> Float[Tensor, "T D"]:
        """The new vector of each position."""
        if self.fused:
            gate, up = self.gate_up_proj(x_TD, adapter).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x_TD, adapter), self.up_proj(x_TD, adapter)
        return self.down_proj(gated(gate, up, self.activation), adapter)


class Block(nn.Module):
    """x + attention(x), then x + mlp(x), each with a norm before it, after it, or both."""

    def __init__(self, config: DecoderConfig, index: int, weights: Weights) -> None:
        super().__init__()
        path = f"model.layers.{index}"
        self.self_attn = SelfAttention(config, index, f"{path}.self_attn", weights)
        self.mlp = MLP(config, f"{path}.mlp", weights)
        self.norms = _NORM_NAMES[config.pre_norm, config.post_norm]
        for name in self.norms:
            if name is not None:
                weight = weights.parameter(f"{path}.{name}.weight", (config.hidden_size,))
                self.add_module(name, Norm(weight, config))

    def forward(self, x_TD: Float[Tensor, "T D"], given: Pass, adapter: str | None = None) -> Float[Tensor, "T D"]:
        """The stream after this block."""
        before_attention, after_attention, before_mlp, after_mlp = self.norms
        gathered = self.self_attn(self._norm(before_attention, x_TD), given, adapter)
        x_TD = x_TD + self._norm(after_attention, gathered)
        changed = self.mlp(self._norm(before_mlp, x_TD), adapter)
        return x_TD + self._norm(after_mlp, changed)

    def _norm(self, name: str | None, x_TD: Tensor) -> Tensor:
        return x_TD if name is None else getattr(self, name)(x_TD)


_NORM_NAMES: dict[tuple[bool, bool], tuple[str | None, str | None, str | None, str | None]] = {
    (True, False): ("input_layernorm", None, "post_attention_layernorm", None),
    (False, True): (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    (True, True): (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""What the norms before and after attention, and before and after the MLP, are called: by (pre_norm, post_norm)."""
