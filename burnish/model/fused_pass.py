"""One pass over all blocks of a decoder by hand, forward and backward: see `model/fused.py`."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from burnish.model.blocks import Block, Norm, Pass
from burnish.model.factors import Factors, Pair
from burnish.model.families import DecoderConfig
from burnish.model.joint import Joint
from burnish.model.layer_gradients import LayerGradients, Low, Read
from burnish.model.shelf import Plan, Shelf
from burnish.model.tiles import joined, part_of, rows8, tiles_of
from burnish.ops.add_norm import Gain, NormBackward, Normed, NormGradient, add_norm, add_norm_backward, norm_again
from burnish.ops.attention import attention_backward, attention_forward
from burnish.ops.fp8 import Quantised, quantise_rows, scaled_matmul
from burnish.ops.gate import GateBackward, gate, gate_backward
from burnish.ops.rope import BeforeNorm, HeadNorms, Heads, Table, norm_rope, rope, rope_backward

ATTENTION_NAMES = ("x", "qkv", "attention")
MLP_NAMES = ("x_mid", "gate_up")
"""What the backward pass of each half of a block takes from the shelf, where it is there."""
JOINTS = ("qkv", "o", "gate_up", "down")
"""The joint layers of a block, in the order in which they are computed."""


class Parts(NamedTuple):
    """What a block is made of, as it is multiplied here."""

    block: Block
    norms: tuple[Norm, Norm]
    qkv: Joint
    o: Joint
    gate_up: Joint
    down: Joint
    head_norms: tuple[Norm, Norm] | None
    """Of each head of queries and of keys; None where the family has none."""


class Half(NamedTuple):
    """What is always kept of half a block: a number or a few for each position."""

    rstd: Tensor
    """Of its norm."""
    low: tuple[Tensor | None, Tensor | None]
    """What its two joint layers read, times their A."""


Added = tuple[Tensor | None, Tensor | None, Pair | None]
"""What a half adds to the stream: its last layer's output without LoRA, what that read times A, and the factors."""


class Trunk(NamedTuple):
    """What passes run over."""

    parts: list[Parts]
    last: Norm
    config: DecoderConfig
    fp8: bool


class FusedPass:
    """One pass over the blocks: what its forward half leaves for its backward half."""

    def __init__(
        self, trunk: Trunk, given: Pass, factors: Factors | None, dtype: torch.dtype, plan: Plan | None = None
    ) -> None:
        assert given.layout is not None
        self.parts, self.last, self.config, self.fp8 = trunk
        self.heads = Heads(self.config.num_heads, self.config.num_kv_heads, self.config.head_dim)
        self.layout, self.tables, self.dtype = given.layout, given.tables, dtype
        self.factors, self.plan = factors, plan
        self.generation = 0 if factors is None else factors.generation
        pairs = iter([None] * (len(JOINTS) * len(self.parts)) if factors is None else factors.pairs)
        self.lora: list[dict[str, Pair | None]] = [{name: next(pairs) for name in JOINTS} for _ in self.parts]
        self.shelf: Shelf | None = None
        self.halves: list[Half] = []
        self.end: tuple[Tensor, Tensor] | None = None
        self.wants_x = False
        self.gradients = LayerGradients(factors)

    def forward(self, x: Tensor) -> Tensor:
        """The hidden states. What half a block adds to the stream is added in the norm that reads the sum."""
        added: Added = (None, None, None)
        for number in range(len(self.parts)):
            x, added = self._attention_forward(number, x, added)
            x, added = self._mlp_forward(number, x, added)
        y, low, pair = added
        last = add_norm(x, y, low, pair and pair.B, gain_of(self.last), None, False)
        self.end = (last.x, last.rstd)
        assert last.h is not None
        return last.h

    def _attention_forward(self, number: int, x: Tensor, added: Added) -> tuple[Tensor, Added]:
        part, lora = self.parts[number], self.lora[number]
        x, rstd, h, h8, low = self._norm(part.norms[0], x, added, lora["qkv"])
        qkv = self.matmul(part.qkv, h, h8)
        del added, h, h8
        self.turn(part, qkv, low, lora["qkv"])
        out, saved = self.attend(part, qkv)
        low_o = None if lora["o"] is None else out @ lora["o"].A.T
        if self.shelf is not None:
            self.halves.append(Half(rstd, (low, low_o)))
            self.shelf.put(number, "x", (x,))
            self.shelf.put(number, "qkv", (qkv,))
            self.shelf.put(number, "attention", (out, *saved))
        del qkv, saved
        y = self.matmul(part.o, out, quantise_rows(out) if self.fp8 else None)
        return x, (y, low_o, lora["o"])

    def _mlp_forward(self, number: int, x: Tensor, added: Added) -> tuple[Tensor, Added]:
        part, lora = self.parts[number], self.lora[number]
        x, rstd, h, h8, low = self._norm(part.norms[1], x, added, lora["gate_up"])
        pair, down = lora["gate_up"], lora["down"]
        Bs = (None, None) if pair is None else pair.Bs
        if self.shelf is not None:
            self.shelf.put(number, "x_mid", (x,))
        pieces = [(part_of(h, rows), rows8(h8, rows), part_of(low, rows)) for rows in self.tiles(number, len(x))]
        outputs: list[Tensor] = []
        lows: list[Tensor | None] = []
        del added, h, h8
        with part.gate_up.decoded(len(pieces) > 1), part.down.decoded(len(pieces) > 1):
            while pieces:
                h, h8, low_here = pieces.pop(0)
                gate_up = self.matmul(part.gate_up, h, h8)
                del h, h8
                h, h8, low_down = gate(
                    gate_up, low_here, Bs[0], Bs[1], down and down.A, self.config.activation, self.fp8
                )
                if self.shelf is not None:
                    self.shelf.put(number, "gate_up", (gate_up,))
                del gate_up
                outputs.append(self.matmul(part.down, h, h8))
                lows.append(low_down)
                del h, h8
        low_down = joined(lows)
        if self.shelf is not None:
            self.halves.append(Half(rstd, (low, low_down)))
        return x, (joined(outputs), low_down, down)

    def tiles(self, number: int, num_tokens: int) -> list[slice | None]:
        """The rows that a block's MLP takes at a time, with gradients and without; all where gate and up are kept."""
        whole = self.plan is None or self.plan.holds(number, "gate_up")
        return tiles_of(num_tokens, None if whole or self.plan is None else self.plan.tile)

    def backward(self, dh: Tensor) -> Tensor | None:
        """The gradient of x, where it is wanted; those of parameters are left in `gradients`."""
        assert self.end is not None
        assert self.shelf is not None
        x, rstd = self.end
        self.end = None
        gradient = self._norm_backward(self.last, NormBackward(dh, x, rstd), (len(self.parts) - 1, "down"))
        del x
        for number in reversed(range(len(self.parts))):
            held = _Held(self, number)
            gradient = self._mlp_backward(held, gradient)
            self.shelf.prefetch(number - 1, MLP_NAMES)  # by now the memory of gate and up is free
            gradient = self._attention_backward(held, gradient)
        self.gradients.finish()
        return gradient.dx if self.wants_x else None

    def _mlp_backward(self, held: "_Held", above: NormGradient) -> NormGradient:
        """From the gradient of a block's output to that of the stream between its halves."""
        part, rstd, x_mid = held.part, held.mlp.rstd, held.before_mlp()
        tiles = self.tiles(held.number, len(x_mid))
        with part.gate_up.decoded(len(tiles) > 1), part.down.decoded(len(tiles) > 1):
            made = [self._mlp_tile(held, above, x_mid, rows, rows is tiles[-1]) for rows in tiles]
        dh, dlow = joined([dh for dh, _ in made]), joined([dlow for _, dlow in made])
        assert dh is not None
        del made
        pair = held.lora["gate_up"]
        seen = NormBackward(dh, x_mid, rstd, above.dx, dlow, pair and pair.A)
        return self._norm_backward(part.norms[1], seen, (held.number, "o"))

    def _mlp_tile(
        self, held: "_Held", above: NormGradient, x_mid: Tensor, rows: slice | None, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """For some rows, the gradients of what gate and up read and of that times A; parameters' are collected."""
        part, (rstd, lows), gain = held.part, held.mlp, gain_of(held.part.norms[1])
        low, low_down, dxa = part_of(lows[0], rows), part_of(lows[1], rows), part_of(above.dxa, rows)
        x_mid, rstd, dx = part_of(x_mid, rows), part_of(rstd, rows), part_of(above.dx, rows)
        pair, down = held.lora["gate_up"], held.lora["down"]
        gate_up = held.gate_up(x_mid, rstd)
        dh = self._back(part.down, dx, rows8(above.dx8, rows))
        scale = part.gate_up.row_scale() if self.fp8 else None
        Bs = (None, None) if pair is None else pair.Bs
        given = GateBackward(dh, gate_up, dxa, down and down.A, low, Bs[0], Bs[1], scale)
        del dh, gate_up
        dgu, dlow, h, dgu8 = gate_backward(given, self.config.activation)
        del given
        self.gradients.collect(part.down, down, dx, Read(h), low_of(low_down, dxa))
        del h
        if last:
            held.prefetch_attention()
        self.gradients.collect(part.gate_up, pair, dgu, Read(x_mid, rstd, gain), low_of(low, dlow))
        return self._back(part.gate_up, dgu, dgu8), dlow

    def _attention_backward(self, held: "_Held", above: NormGradient) -> NormGradient:
        """From the gradient of the stream between a block's halves to that of its input."""
        part, lora, number, (rstd, (low, low_o)) = held.part, held.lora, held.number, held.attention
        pair, norm, attention = lora["qkv"], part.norms[0], part.block.self_attn
        x, qkv, out, saved = held.before_attention()
        dout = self._back(part.o, above.dx, above.dx8)
        if lora["o"] is not None:
            dout.addmm_(cast(Tensor, above.dxa), lora["o"].A)
        self.gradients.collect(part.o, lora["o"], above.dx, Read(out), low_of(low_o, above.dxa))
        shape = (len(out), self.heads.queries, self.heads.width)
        split = self._split(part, qkv)
        gradients = attention_backward(
            dout.view(shape), split, out.view(shape), saved, self.layout, attention.scale, attention.window
        )
        before = self._before(part, qkv)
        del split, qkv, out, saved, dout
        scale = part.qkv.row_scale() if self.fp8 else None
        dqkv, dlow, dqkv8, dnorms = rope_backward(*gradients, self._table(part), _three(pair), scale, before)
        del gradients, before
        for head_norm, dweight in zip(part.head_norms or (), dnorms or (), strict=False):
            if head_norm.weight.requires_grad:
                self.gradients.put(head_norm.weight, dweight.to(head_norm.weight.dtype))
        self.gradients.collect(part.qkv, pair, dqkv, Read(x, rstd, gain_of(norm)), low_of(low, dlow))
        if number == 0 and not self.wants_x and not norm.weight.requires_grad:
            return above
        dh = self._back(part.qkv, dqkv, dqkv8)
        del dqkv, dqkv8
        seen = NormBackward(dh, x, rstd, above.dx, dlow, pair and pair.A)
        return self._norm_backward(norm, seen, (number - 1, "down") if number else None)

    def _norm(self, norm: Norm, x: Tensor, added: Added, pair: Pair | None) -> Normed:
        y, low, before = added
        return add_norm(x, y, low, before and before.B, gain_of(norm), pair and pair.A, self.fp8)

    def matmul(self, joint: Joint, h: Tensor | None, h8: Quantised | None) -> Tensor:
        """h Wᵀ, in 8 bits where h is."""
        if h8 is not None:
            return scaled_matmul(h8, joint.fp8(transposed=False), joint.row_scale(), self.dtype)
        assert h is not None
        return h @ joint.dense(h.dtype).T

    def _back(self, joint: Joint, dy: Tensor, dy8: Quantised | None) -> Tensor:
        if dy8 is not None:  # the rows' scales are in dy8
            return scaled_matmul(dy8, joint.fp8(transposed=True), None, self.dtype)
        return dy @ joint.dense(dy.dtype)

    def turn(self, part: Parts, qkv: Tensor, low: Tensor | None, pair: Pair | None) -> None:
        """LoRA, bias and, where heads are not normed first, rotation, in place."""
        table = self._table(part) if part.head_norms is None else None
        rope(qkv, low, _three(pair), part.qkv.bias, table, self.heads)

    def _table(self, part: Parts) -> Table | None:
        number = part.block.self_attn.rope
        return None if number is None else self.tables[number]

    def attend(self, part: Parts, qkv: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What attention gives, as a matrix, and what its backward pass wants besides."""
        attention = part.block.self_attn
        out, saved = attention_forward(*self._split(part, qkv), self.layout, attention.scale, attention.window)
        return out.flatten(1), saved

    def _split(self, part: Parts, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as attention reads them: slices of qkv, or normed and turned in memory of their own."""
        queries, keys, width = self.heads
        q, k, v = qkv.unflatten(1, (-1, width)).split((queries, keys, keys), dim=1)
        before, table = self._before(part, qkv), self._table(part)
        if before is not None and table is not None:
            q, k = norm_rope(qkv, before.norms, table, self.heads)
        return q, k, v

    def _before(self, part: Parts, qkv: Tensor) -> BeforeNorm | None:
        if part.head_norms is None:
            return None
        q_norm, k_norm = part.head_norms
        weights = q_norm.weight.detach(), k_norm.weight.detach()
        wants_weights = q_norm.weight.requires_grad or k_norm.weight.requires_grad
        return BeforeNorm(qkv, HeadNorms(*weights, q_norm.eps, q_norm.offset), wants_weights)

    def _norm_backward(self, norm: Norm, given: NormBackward, below: tuple[int, str] | None) -> NormGradient:
        """Through a norm; `below` is the joint layer whose output was added to the stream before it."""
        if below is not None:
            number, name = below
            lora = self.lora[number][name]
            scale = joints_of(self.parts[number])[name].row_scale() if self.fp8 else None
            given = given._replace(B=lora and lora.B, w_scale=scale)
        gradient = add_norm_backward(given, gain_of(norm), norm.weight.requires_grad)
        if gradient.dweight is not None:
            self.gradients.put(norm.weight, gradient.dweight.to(norm.weight.dtype))
        return gradient


class _Held:
    """What the backward pass of one block needs, taken from the shelf or computed again, each once."""

    def __init__(self, run: FusedPass, number: int) -> None:
        assert run.shelf is not None
        self.run, self.number, self.shelf = run, number, run.shelf
        self.mlp, self.attention = run.halves.pop(), run.halves.pop()
        self.part, self.lora = run.parts[number], run.lora[number]
        self._attention: tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]] | None = None

    def prefetch_attention(self) -> None:
        """Begin to copy back what `before_attention` will want of the host."""
        self.shelf.prefetch(self.number, ATTENTION_NAMES)

    def before_attention(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """The stream before the block, qkv as `turn` left it, what attention made of it, and what it keeps besides.

        They are the caller's own: nothing is held here any more.
        """
        known, self._attention = self._attention or self._attend(), None
        return known

    def before_mlp(self) -> Tensor:
        """The stream between the halves: the caller's own."""
        found = self.shelf.get(self.number, "x_mid")
        return self._middle() if found is None else found[0]

    def gate_up(self, x_mid: Tensor, rstd: Tensor) -> Tensor:
        """Gate and up without LoRA of these rows: the caller's own."""
        found = self.shelf.get(self.number, "gate_up")
        if found is not None:
            return found[0]
        h, h8 = norm_again(x_mid, rstd, gain_of(self.part.norms[1]), self.run.fp8)
        return self.run.matmul(self.part.gate_up, h, h8)

    def _middle(self) -> Tensor:
        self._attention = x, _, out, _ = self._attend()
        pair, low, gain = self.lora["o"], self.attention.low[1], gain_of(self.part.norms[1])
        y = self.run.matmul(self.part.o, out, quantise_rows(out) if self.run.fp8 else None)
        return add_norm(x, y, low, pair and pair.B, gain, None, False).x

    def _attend(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        stream = self.shelf.get(self.number, "x")
        assert stream is not None
        found, kept = self.shelf.get(self.number, "qkv"), self.shelf.get(self.number, "attention")
        if found is None:
            h, h8 = norm_again(stream[0], self.attention.rstd, gain_of(self.part.norms[0]), self.run.fp8)
            qkv = self.run.matmul(self.part.qkv, h, h8)
            del h, h8
            self.run.turn(self.part, qkv, self.attention.low[0], self.lora["qkv"])
        else:
            (qkv,) = found
        if kept is None:
            out, saved = self.run.attend(self.part, qkv)
        else:
            out, saved = kept[0], kept[1:]
        return stream[0], qkv, out, saved


def joints_of(part: Parts) -> dict[str, Joint]:
    """The joint layers of a block, by their names in JOINTS."""
    return {"qkv": part.qkv, "o": part.o, "gate_up": part.gate_up, "down": part.down}


def gain_of(norm: Norm) -> Gain:
    """What the norm multiplies by."""
    return Gain(norm.weight.detach(), norm.eps, norm.offset)


def low_of(values: Tensor | None, gradient: Tensor | None) -> Low | None:
    """The middle of LoRA with its gradient; None where there is no LoRA."""
    return None if values is None or gradient is None else Low(values, gradient)


def _three(pair: Pair | None) -> tuple[Tensor, Tensor, Tensor] | None:
    return None if pair is None else (pair.Bs[0], pair.Bs[1], pair.Bs[2])
