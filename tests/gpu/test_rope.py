"""The kernels of rotation on the GPU, at the shapes of real models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.ops import rope as ops
from burnish.ops.attention import rotary_table
from burnish.ops.rope import BeforeNorm, HeadNorms, Heads, norm_rope, rope, rope_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LLAMA_2, LLAMA_3, SMALL, PHI = Heads(32, 32, 128), Heads(32, 8, 128), Heads(14, 2, 64), Heads(24, 8, 80)
SHAPES = [
    (2051, LLAMA_2, 64, 16),
    (2048, LLAMA_3, 64, 64),
    (300, SMALL, 32, 16),
    (17, PHI, 20, 16),
    (1, LLAMA_3, 64, 256),
]
QWEN_3, GEMMA_3 = Heads(32, 8, 128), Heads(8, 4, 256)
NORMED = [
    (2051, QWEN_3, 16),
    (2048, GEMMA_3, 64),
    (300, SMALL, 0),
    (17, PHI, 16),
    (1, QWEN_3, 256),
]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a value the kernel does not write shows."""
    empty = torch.empty

    def poison(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.view(torch.uint8).fill_(0x7F).view(made.dtype) if made.itemsize == 1 else made.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison)


def drawn(total: int, heads: Heads, rank: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """qkv, xa, Bs and bias in bf16."""
    torch.manual_seed(0)
    sizes = (heads.queries * heads.width, heads.keys * heads.width, heads.keys * heads.width)
    q, k, v = (torch.randn(size, rank, device="cuda", dtype=torch.bfloat16) * 0.1 for size in sizes)
    others = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((total, sum(sizes)), (sum(sizes),))]
    return others[0], torch.randn(total, 3 * rank, device="cuda", dtype=torch.bfloat16), (q, k, v), others[1]


def angles(total: int, pairs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    frequencies = tuple(10000 ** (-i / pairs) for i in range(pairs))
    cos, sin = rotary_table(torch.arange(total, device="cuda"), frequencies)
    return cos.to(dtype), sin.to(dtype)


def norms_of(heads: Heads, dtype: torch.dtype = torch.float32) -> HeadNorms:
    """Gains around 1, of which some are 0, stored minus 1."""
    generator = torch.Generator("cuda").manual_seed(1)
    q, k = (torch.randn(heads.width, device="cuda", generator=generator) * 0.5 for _ in range(2))
    q[::5], k[::7] = -1, -1
    return HeadNorms(q.to(dtype), k.to(dtype), 1e-6, 1.0)


def assert_within_twice(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    assert bool(torch.isfinite(ours).all())
    assert (ours.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-4 * exact.norm()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("total", "heads", "pairs", "rank"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_errs_at_most_twice_as_much_as_the_reference(
    monkeypatch, total: int, heads: Heads, pairs: int, rank: int, with_bias: bool
) -> None:
    qkv, xa, low, bias = drawn(total, heads, rank)
    table = angles(total, pairs)
    ours, plain, exact = qkv.clone(), qkv.clone(), qkv.double()
    rope(ours, xa, low, bias if with_bias else None, table, heads)
    monkeypatch.setattr(ops, "takes_kernel", lambda x: False)
    rope(plain, xa, low, bias if with_bias else None, table, heads)
    wide = tuple(part.double() for part in low)
    wide_bias = bias.double() if with_bias else None
    rope(exact, xa.double(), wide, wide_bias, angles(total, pairs, torch.float64), heads)
    assert_within_twice(ours, plain, exact)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("total", "heads", "pairs", "rank"), SHAPES)
@pytest.mark.parametrize("fp8", [False, True])
def test_backward_errs_at_most_twice_as_much_as_the_reference(
    monkeypatch, total: int, heads: Heads, pairs: int, rank: int, fp8: bool
) -> None:
    gradient, _, low, _ = drawn(total, heads, rank)
    dq, dk, dv = gradient.unflatten(1, (-1, heads.width)).split((heads.queries, heads.keys, heads.keys), dim=1)
    dk, dv = dk.contiguous(), dv.transpose(0, 1).contiguous().transpose(0, 1)
    w_scale = torch.rand(gradient.shape[1], device="cuda") + 0.1 if fp8 else None
    table = angles(total, pairs)
    ours = rope_backward(dq, dk, dv, table, low, w_scale)
    monkeypatch.setattr(ops, "takes_kernel", lambda x: False)
    plain = rope_backward(dq, dk, dv, table, low, w_scale)
    wide = tuple(part.double() for part in low)
    wide_table = angles(total, pairs, torch.float64)
    exact = rope_backward(dq.double(), dk.double(), dv.double(), wide_table, wide, None)
    assert_within_twice(ours.dqkv, plain.dqkv, exact.dqkv)
    assert ours.dxa is not None
    assert_within_twice(ours.dxa, plain.dxa, exact.dxa)
    assert (ours.dqkv8 is None) == (w_scale is None)
    if ours.dqkv8 is not None and plain.dqkv8 is not None and w_scale is not None:
        found, reference = (x.values.float() * x.scale[:, None] for x in (ours.dqkv8, plain.dqkv8))
        assert_within_twice(found, reference, exact.dqkv * w_scale)


def test_without_lora_there_and_back_is_the_identity_beyond_2_to_the_31_numbers() -> None:
    total = 2**31 // 12288 + 40
    qkv = torch.empty(total, 12288, device="cuda", dtype=torch.bfloat16).normal_()
    last = qkv[-50:].clone()
    table = angles(total, 64)
    rope(qkv, None, None, None, table, LLAMA_2)
    assert not torch.equal(qkv[-50:, :8192], last[:, :8192])
    assert torch.equal(qkv[-50:, 8192:], last[:, 8192:])
    parts = qkv.unflatten(1, (-1, 128)).split((32, 32, 32), dim=1)
    back = rope_backward(*parts, table, None, None)
    torch.testing.assert_close(back.dqkv[-50:].float(), last.float(), atol=0.03, rtol=0.02)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("total", "heads", "rank"), NORMED)
def test_norms_of_heads_err_at_most_twice_as_much_as_the_reference(monkeypatch, total: int, heads: Heads, rank) -> None:
    qkv, _, low, _ = drawn(total, heads, max(rank, 1))
    low, pairs, norms = low if rank else None, heads.width // 2, norms_of(heads)
    table = angles(total, pairs)
    arrived = (
        torch.randn_like(qkv).unflatten(1, (-1, heads.width)).split((heads.queries, heads.keys, heads.keys), dim=1)
    )
    before = BeforeNorm(qkv, norms, wants_weights=True)
    ours, again = (torch.cat(norm_rope(qkv, norms, table, heads), 1) for _ in range(2))
    back = rope_backward(*arrived, table, low, None, before)
    frozen = rope_backward(*arrived, table, low, None, before._replace(wants_weights=False))
    assert torch.equal(ours, again)
    assert frozen.dnorms is None
    assert_within_twice(frozen.dqkv, back.dqkv, back.dqkv.double())
    monkeypatch.setattr(ops, "takes_kernel", lambda x: False)
    plain = torch.cat(norm_rope(qkv, norms, table, heads), 1)
    plain_back = rope_backward(*arrived, table, low, None, before)
    wide, wide_table = norms_of(heads, torch.float64), angles(total, pairs, torch.float64)
    exact = torch.cat(norm_rope(qkv.double(), wide, wide_table, heads), 1)
    wide_low = tuple(part.double() for part in low) if low else None
    wide_before = BeforeNorm(qkv.double(), wide, wants_weights=True)
    exact_back = rope_backward(*(d.double() for d in arrived), wide_table, wide_low, None, wide_before)
    assert_within_twice(ours, plain, exact)
    assert_within_twice(back.dqkv, plain_back.dqkv, exact_back.dqkv)
    assert (back.dxa is None) == (rank == 0)
    if back.dxa is not None:
        assert_within_twice(back.dxa, plain_back.dxa, exact_back.dxa)
    assert back.dnorms is not None
    for found, reference, wanted in zip(back.dnorms, plain_back.dnorms, exact_back.dnorms, strict=True):
        assert_within_twice(found, reference, wanted)


@pytest.mark.parametrize("rank", [0, 16])
def test_without_a_table_nothing_turns(monkeypatch, rank: int) -> None:
    qkv, xa, low, bias = drawn(300, LLAMA_3, max(rank, 1))
    xa, low = (xa, low) if rank else (None, None)
    ours, plain = qkv.clone(), qkv.clone()
    rope(ours, xa, low, bias, None, LLAMA_3)
    parts = qkv.unflatten(1, (-1, 128)).split((32, 8, 8), dim=1)
    back = rope_backward(*parts, None, low, None)
    assert torch.equal(back.dqkv, qkv)
    monkeypatch.setattr(ops, "takes_kernel", lambda x: False)
    rope(plain, xa, low, bias, None, LLAMA_3)
    torch.testing.assert_close(ours, plain)
    if rank:
        torch.testing.assert_close(back.dxa, rope_backward(*parts, None, low, None).dxa, atol=0.02, rtol=0.02)
