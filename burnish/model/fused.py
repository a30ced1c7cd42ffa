"""All blocks of a decoder forward and backward by hand: fewer passes over memory, and each tensor kept by choice.

What autograd and a compiler would do, done so that q, k and v are one matmul and gate and up another; that LoRA is
part of kernels which read their data anyway (arXiv 2106.09685: y = W x + s B A x, with s folded into B); and that what
waits for the backward pass is kept, sent to the host or computed again, as the plan of the shelf says for each tensor.
The output of down_proj is never computed again: nothing in the backward pass needs it.

With x the stream, n a norm's output, t = n Aᵀ, dy the gradient of a joint layer's output and g = dy B, a layer gives
dx = dy W + g A, dA = gᵀ n, dB = s dyᵀ t, and, where it trains, dW = dyᵀ n.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.model.adapters import LoRA
from burnish.model.blocks import Block, Norm, Pass
from burnish.model.factors import Factors, Slots
from burnish.model.families import DecoderConfig
from burnish.model.fused_pass import FusedPass, Parts, Trunk, joints_of
from burnish.model.graphed import Graphs, Recorder
from burnish.model.joint import Joint
from burnish.model.layer_gradients import Taking, is_trained
from burnish.model.shelf import HostMemory, Plan, Shelf


class FusedBlocks:
    """The blocks and the last norm of a decoder, run by hand, for whoever calls `Decoder.hidden` and `score`."""

    def __init__(self, blocks: Sequence[Block], last: Norm, config: DecoderConfig, fp8: bool) -> None:
        self.trunk = Trunk([_parts(block) for block in blocks], last, config, fp8)
        self.host = HostMemory(last.weight.device)
        self._joints = [joint for part in self.trunk.parts for joint in joints_of(part).values()]
        self._slots = Slots(self._joints)
        self._own = _own_parameters(self.trunk)
        self._factors: dict[str, Factors] = {}
        self.graphs: Graphs | None = None
        self.taking = Taking()

    def takes(self, adapter: str | None, training: bool) -> bool:
        """Whether the model with this adapter is one that can be run by hand: LoRA without dropout, or none."""
        present = [chosen for chosen in self._slots.of(adapter) if chosen is not None]
        return all(isinstance(chosen, LoRA) and not (training and chosen.dropout) for chosen in present)

    def __call__(
        self, x_TD: Float[Tensor, "T D"], given: Pass, adapter: str | None, plan: Plan
    ) -> Float[Tensor, "T D"]:
        """The stream after all blocks and the last norm, differentiable in x, factors and trained weights."""
        factors = self.prepare(adapter, x_TD.dtype)
        candidates = self._own if factors is None else [*factors.parameters, *self._own]
        parameters = [parameter for parameter in candidates if parameter.requires_grad]
        goes_back = torch.is_grad_enabled() and (x_TD.requires_grad or len(parameters) > 0)
        num_tokens = len(x_TD)
        if self.graphs is not None and plan.tile is None:
            key = self.graphs.key(x_TD, given, factors, parameters, plan, goes_back)
            if key is not None:
                hidden_TD = self.graphs(key, x_TD, given, parameters)
                if hidden_TD is not None:
                    return hidden_TD
                x_TD, given = self.graphs.padded(key, x_TD, given)
        run = FusedPass(self.trunk, given, factors, x_TD.dtype, plan)
        if not goes_back:
            return run.forward(x_TD)[:num_tokens]
        run.shelf = Shelf(plan, self.host)
        self.taking.passes += 1
        run.gradients.taking = self.taking if plan.tile is None else None  # a tile gives a part of a gradient
        return cast(Tensor, _Blocks.apply(run, x_TD, *parameters))[:num_tokens]

    def prepare(self, adapter: str | None, dtype: torch.dtype) -> Factors | None:
        """The factors as they are multiplied with, made anew where they have changed; None where there are none.

        The next pass asks for them in any case. After an optimizer step they cost nothing, while the device is busy.
        """
        present = self._slots.of(adapter)
        if adapter is None or not any(present):
            self._factors.pop(adapter or "", None)
            return None
        with torch.inference_mode(False):  # later passes with gradients go on with the same copies
            held = self._factors.get(adapter)
            if held is None or held.dtype != dtype or held.adapters != present:
                held = self._factors[adapter] = Factors(self._joints, present, adapter, dtype)
            held.refresh()
        return held

    def trained_matrices(self) -> list[list[nn.Parameter]]:
        """The weights of each layer whose gradients can be taken as they appear; nothing where they are frozen."""
        return [
            [weight for weight in joint.weights if weight is not None] for joint in self._joints if is_trained(joint)
        ]

    def hold_decoded(self, num_blocks: int) -> None:
        """Keep the weights of the first so many blocks as they are multiplied with; they must be frozen."""
        for number, part in enumerate(self.trunk.parts):
            for joint in joints_of(part).values():
                joint.hold = number < num_blocks

    def use_graphs(self) -> None:
        """Replay CUDA graphs from now on, where the host is slower than the device (`model/graphed.py`)."""
        self.graphs = Graphs(self.trunk, self.host, Recorder(self.host.device))

    def release(self) -> None:
        """Give back what is only held to save time: it is made again when it is needed."""
        if self.graphs is not None:
            self.graphs.release()
        for joint in self._joints:
            joint.release()


# A compiler would find nothing to improve in it, and what it keeps is not for a graph.
FusedBlocks.__call__ = torch.compiler.disable(FusedBlocks.__call__)  # pyright: ignore[reportAttributeAccessIssue]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: FusedPass, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.run, ctx.parameters = run, parameters
        run.wants_x = ctx.needs_input_grad[1]
        return run.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        run: FusedPass | None = ctx.run
        if run is None:
            raise RuntimeError("a second backward pass: what the first one needed is not kept")
        if run.factors is not None and run.factors.generation != run.generation:
            raise RuntimeError("the adapter has changed between a forward pass and its backward pass")
        dx = run.backward(grads[0].contiguous())
        ctx.run = None
        return None, dx, *(run.gradients.found.get(id(parameter)) for parameter in ctx.parameters)


def supported(config: DecoderConfig) -> bool:
    """Whether decoders of this kind can be run by hand: pre-norm, gated, without soft cap; heads may be normed."""
    plain = config.pre_norm and not config.post_norm and config.qk_norm != "full"
    plain &= not (config.output_bias or config.mlp_bias) and config.attention_softcap is None
    if config.qk_norm == "head":  # all channels are normed and turned in one go
        plain &= all(layer.rope is not None for layer in config.layers)
        plain &= all(2 * len(rope.frequencies) == config.head_dim for rope in config.ropes)
    sizes = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim, config.head_dim)
    return plain and all(size % 16 == 0 for size in sizes) and len(config.layers) > 0


def _parts(block: Block) -> Parts:
    attention, mlp = block.self_attn, block.mlp
    names = [name for name in block.norms if name is not None]
    if attention.fused:
        qkv = Joint([attention.qkv_proj], attention.widths)
        gate_up = Joint([mlp.gate_up_proj], [mlp.gate_up_proj.shape[0] // 2] * 2)
    else:
        qkv = Joint([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up = Joint([mlp.gate_proj, mlp.up_proj])
    norms = cast(Norm, getattr(block, names[0])), cast(Norm, getattr(block, names[1]))
    joints = qkv, Joint([attention.o_proj]), gate_up, Joint([mlp.down_proj])
    return Parts(block, norms, *joints, (attention.q_norm, attention.k_norm) if attention.qk_norm == "head" else None)


def _own_parameters(trunk: Trunk) -> list[nn.Parameter]:
    """The parameters of the blocks and the last norm, whether they are trained or not; no adapter's."""
    found: list[nn.Parameter] = []
    for part in trunk.parts:
        for joint in joints_of(part).values():
            found += [weight for weight in joint.weights if weight is not None]
            found += [layer.bias for layer in joint.layers if layer.bias is not None]
        found += [norm.weight for norm in (*part.norms, *(part.head_norms or ()))]
    return [*found, trunk.last.weight]
