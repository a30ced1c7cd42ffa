"""What plans promise against the real pass, whose kernels here do nothing but take the memory that theirs take."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, empty, empty_like

from burnish.engine.budget import Work, peak_bytes, sizes_of
from burnish.engine.memory import measured_peak
from burnish.model import fused_pass, joint, layer_gradients
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.shelf import Plan, keep_everything, keep_inputs
from burnish.ops.add_norm import Normed, NormGradient
from burnish.ops.fp8 import FP8, Quantised
from burnish.ops.gate import Gated, GateGradient
from burnish.ops.rope import RopeGradient
from tests.tiny import Groups, tiny_batch, tiny_folder, tiny_shared_batch

BF16 = torch.bfloat16
TOKENS, LAYERS = 2048, 3
SHAPE = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 32}
SHARED: Groups = ((512, (64,) * 8), (512, (64,) * 8))  # 2,048 tokens, and 9,216 keys


def matrix(*shape: int) -> Tensor:
    return empty(shape, dtype=BF16)


def eighths(x: Tensor) -> Quantised:
    return Quantised(empty(x.shape, dtype=FP8), empty(len(x)))


def add_norm(x: Tensor, y: Tensor | None, _low: Any, _B: Any, _gain: Any, A: Tensor | None, fp8: bool) -> Normed:
    h8 = eighths(x) if fp8 else None
    added = x if y is None else empty_like(x)
    return Normed(added, empty(len(x)), None if fp8 else empty_like(x), h8, A if A is None else matrix(len(x), len(A)))


def norm_again(x: Tensor, _rstd: Any, _gain: Any, fp8: bool) -> tuple[Tensor | None, Quantised | None]:
    return (None, eighths(x)) if fp8 else (empty_like(x), None)


def add_norm_backward(given: Any, _gain: Any, _wants: bool) -> NormGradient:
    product = None if given.A is None else empty_like(given.x)  # dha A, by cuBLAS
    dx = empty_like(given.x)
    del product
    dx8 = None if given.w_scale is None else eighths(dx)
    return NormGradient(dx, None if given.B is None else matrix(len(dx), given.B.shape[1]), dx8, None)


def attention_forward(q: Tensor, k: Tensor, _v: Any, layout: Any, *_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    copies = None if layout.keys is None else [empty_like(k[layout.keys.position]) for _ in range(2)]
    out = empty(q.shape, dtype=BF16)
    del copies
    return out, (empty(q.shape[1], q.shape[0]),)


def attention_backward(_dout: Any, given: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (q, k, _), layout = given, rest[2]
    number, held = (len(k), []) if layout.keys is None else (len(layout.keys.position), [])
    if layout.keys is not None:
        held += [matrix(number, *k.shape[1:]) for _ in range(4)]  # copies, and their gradients
    if k.shape[1] < q.shape[1]:
        held += [matrix(number, *q.shape[1:]) for _ in range(2)]  # for each query head
    sums, dq = empty(q.shape), matrix(*q.shape)
    dk, dv = matrix(*k.shape), matrix(*k.shape)
    del sums, held
    return dq, dk, dv


def gate(gu: Tensor, _low: Any, Bg: Tensor | None, _Bu: Any, A: Tensor | None, _activation: Any, fp8: bool) -> Gated:
    copy = empty_like(gu) if Bg is not None and Bg.shape[1] > 64 else None
    h = matrix(len(gu), gu.shape[1] // 2)
    del copy
    ha = None if A is None else matrix(len(gu), len(A))
    return Gated(None, eighths(h), ha) if fp8 else Gated(h, None, ha)


def gate_backward(given: Any, _activation: Any) -> GateGradient:
    low = None if given.Bg is None else matrix(len(given.gu), 2 * given.Bg.shape[1])
    return GateGradient(given.gu, low, given.dh, None if given.w_scale is None else eighths(given.gu))


def norm_rope(qkv: Tensor, _norms: Any, _table: Any, heads: Any) -> tuple[Tensor, ...]:
    return matrix(len(qkv), heads.queries + heads.keys, heads.width).split((heads.queries, heads.keys), dim=1)


def rope_backward(
    dq: Tensor, dk: Tensor, _dv: Any, _table: Any, Bs: Any, scale: Tensor | None, _before: Any
) -> RopeGradient:
    dqkv = matrix(len(dq), (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2])
    low = None if Bs is None else matrix(len(dq), 3 * Bs[0].shape[1])
    return RopeGradient(dqkv, low, None if scale is None else eighths(dqkv), None)


@pytest.fixture(autouse=True)
def _taking(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[Callable[..., Any]] = [add_norm, norm_again, add_norm_backward, attention_forward, gate, norm_rope]
    for stand_in in (*kernels, attention_backward, gate_backward, rope_backward):
        monkeypatch.setattr(fused_pass, stand_in.__name__, stand_in)
    monkeypatch.setattr(fused_pass, "rope", lambda *_: None)
    monkeypatch.setattr(fused_pass, "quantise_rows", eighths)
    monkeypatch.setattr(fused_pass, "scaled_matmul", lambda x8, w8, *_: matrix(len(x8.values), len(w8)))
    monkeypatch.setattr(
        layer_gradients, "outer", lambda dy, low, widths: empty(dy.shape[1], low.shape[1] // len(widths))
    )
    monkeypatch.setattr(layer_gradients, "_product", lambda left, right, dtype: empty(len(left), right.shape[1]))
    monkeypatch.setattr(joint.Joint, "_dense", lambda self, dtype: empty(self.shape, dtype=dtype))
    monkeypatch.setattr(
        joint.Joint, "_fp8", lambda self, turned: empty(self.shape[::-1] if turned else self.shape, dtype=FP8)
    )
    scale = empty(0)
    monkeypatch.setattr(joint.Joint, "row_scale", lambda self: scale)


PLANS: dict[str, Plan] = {
    "all": keep_everything(LAYERS),
    "least": keep_inputs(LAYERS),
    "tiles": dataclasses.replace(keep_inputs(LAYERS), tile=512),
    "some": Plan((frozenset({"x", "x_mid", "attention"}),) * LAYERS, (frozenset(),) * LAYERS, tile=1024),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("architecture", "rank", "kv_heads", "shared"),
    [
        ("LlamaForCausalLM", 16, 4, False),
        ("LlamaForCausalLM", 128, 4, False),
        ("LlamaForCausalLM", 16, 1, False),
        ("LlamaForCausalLM", 16, 2, True),
        ("Qwen3ForCausalLM", 16, 2, False),
    ],
)
def test_a_pass_takes_what_was_promised(
    tmp_path: Path, architecture: str, rank: int, kv_heads: int, shared: bool, fp8: bool, plan: str
) -> None:
    shape = {**SHAPE, "num_hidden_layers": LAYERS, "num_key_value_heads": kv_heads, "max_position_embeddings": 4096}
    model = load_model(tiny_folder(tmp_path / "model", architecture, **shape), "nf4", dtype=BF16)
    add_adapter(model, "a", AdapterSpec(rank=rank), torch.Generator().manual_seed(0))
    assert model.fuse_blocks(fp8)
    assert model.fused is not None
    batch = tiny_shared_batch(SHARED)[1] if shared else tiny_batch((TOKENS,))
    given = model._packed(batch)
    model.fused.prepare("a", BF16)
    for parameter in adapter_parameters(model, "a").values():
        parameter.grad = torch.zeros_like(parameter)
    keys = 0 if given.layout is None or given.layout.keys is None else len(given.layout.keys.position)
    work = Work(len(batch.tokens), TOKENS, rank, 2, "nf4", fp8, keys=keys)
    sizes = sizes_of(model.config, work)._replace(head=0)
    with measured_peak(torch.device("cpu"), []) as peak:
        x = matrix(len(batch.tokens), SHAPE["hidden_size"])
        (model.fused(x, given, "a", PLANS[plan]) * 1.0).sum().backward()
    factors = sum(parameter.nbytes for parameter in adapter_parameters(model, "a").values())
    promised = peak_bytes(PLANS[plan], sizes) + factors  # new gradients come beside the old ones here
    assert peak.bytes <= promised
    assert peak.bytes >= 0.7 * promised
