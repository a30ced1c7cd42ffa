"""The kernels of rotation against the reference, in Triton's interpreter."""

from typing import NamedTuple

import pytest
import torch

from burnish.kernels import rope as kernels
from burnish.ops.attention import rotary_table
from burnish.ops.rope import BeforeNorm, HeadNorms, Heads, norm_rope, rope, rope_backward
from tests.kernels.casts import right_casts

__all__ = ["right_casts"]
pytestmark = pytest.mark.usefixtures("right_casts")
Bs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Case(NamedTuple):
    """What `rope` is given."""

    total: int
    heads: Heads
    pairs: int
    rank: int
    bias: bool


CASES = [
    Case(17, Heads(2, 2, 32), pairs=16, rank=16, bias=False),
    Case(33, Heads(9, 3, 40), pairs=10, rank=16, bias=True),  # grouped, partial, more heads than a program has
    Case(1, Heads(2, 1, 80), pairs=40, rank=32, bias=True),
    Case(5, Heads(3, 1, 16), pairs=8, rank=0, bias=False),
    Case(40, Heads(2, 2, 24), pairs=4, rank=0, bias=False),
    Case(3, Heads(2, 1, 24), pairs=12, rank=0, bias=True),
    Case(4, Heads(2, 1, 16), pairs=8, rank=24, bias=False),
    Case(3, Heads(35, 17, 20), pairs=8, rank=16, bias=False),  # the way back: three groups of queries, two of keys
]
NORMED = [
    Case(33, Heads(2, 1, 64), pairs=32, rank=0, bias=False),
    Case(17, Heads(9, 2, 80), pairs=40, rank=16, bias=False),  # more heads than a program of the way there has
    Case(40, Heads(2, 2, 128), pairs=64, rank=16, bias=False),
    Case(18, Heads(1, 1, 256), pairs=128, rank=32, bias=False),
    Case(1, Heads(2, 1, 32), pairs=16, rank=16, bias=False),
    Case(3, Heads(18, 17, 16), pairs=8, rank=16, bias=False),  # the way back: two groups of queries, two of keys
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a value the kernel does not write shows."""
    empty = torch.empty

    def poison(*size: object, **options: object) -> torch.Tensor:
        made = empty(*size, **options)
        return made.view(torch.uint8).fill_(0x7F).view(made.dtype) if made.itemsize == 1 else made.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison)


def drawn(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, Bs | None, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    queries, keys, width = case.heads
    sizes = (queries * width, keys * width, keys * width)
    parts = [torch.randn(size, max(case.rank, 1), generator=generator).to(dtype) * 0.3 for size in sizes]
    qkv = torch.randn(case.total, sum(sizes), generator=generator).to(dtype)
    bias = torch.randn(sum(sizes), generator=generator).to(dtype) if case.bias else None
    if not case.rank:
        return qkv, None, None, bias
    return qkv, torch.randn(case.total, 3 * case.rank, generator=generator).to(dtype), (*parts,), bias


def angles(case: Case, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = tuple(10 ** (-i / case.pairs) for i in range(case.pairs))
    cos, sin = rotary_table(torch.arange(case.total) * 7 % 31, frequencies, scale=1.1)
    return cos.to(dtype), sin.to(dtype)


def norms_of(case: Case, dtype: torch.dtype) -> HeadNorms:
    """Gains around 1, of which some are 0, stored minus 1."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(case.heads.width, generator=generator).to(dtype) * 0.5 for _ in range(2)]
    for weight in weights:
        weight[::5] = -1
    return HeadNorms(weights[0], weights[1], 1e-3, 1.0)


def doubled(*given: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x.double() for x in given]


def assert_within_twice(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    assert bool(torch.isfinite(ours).all())
    floor = torch.finfo(ours.dtype).eps * exact.norm() * 0.01
    assert (ours.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_forward_errs_at_most_twice_as_much_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    qkv, xa, low, bias = drawn(case, dtype)
    ours, plain, exact = qkv.clone(), qkv.clone(), qkv.double()
    kernels.rope(ours, xa, low, bias, angles(case), case.heads)
    rope(plain, xa, low, bias, angles(case), case.heads)
    wide_xa, wide_bias, *wide_low = doubled(xa, bias, *(low or ()))
    rope(exact, wide_xa, (*wide_low,) if low else None, wide_bias, angles(case, torch.float64), case.heads)
    assert_within_twice(ours, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_backward_errs_at_most_twice_as_much_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    gradient, _, low, _ = drawn(case, dtype)
    queries, keys, width = case.heads
    # Of three layouts: a slice of a wider buffer, heads before tokens, tokens before heads.
    parts = gradient.unflatten(1, (-1, width)).split((queries, keys, keys), dim=1)
    dq, dk, dv = parts[0], parts[1].transpose(0, 1).contiguous().transpose(0, 1), parts[2].contiguous()
    dqkv, dxa, _ = kernels.rope_backward(dq, dk, dv, angles(case), low, None)
    plain = rope_backward(dq, dk, dv, angles(case), low, None)
    wide_low = [part.double() for part in low or ()]
    wide = [d.double() for d in (dq, dk, dv)]
    exact = rope_backward(*wide, angles(case, torch.float64), (*wide_low,) if low else None, None)
    assert_within_twice(dqkv, plain.dqkv, exact.dqkv)
    assert (dxa is None) == (low is None)
    if dxa is not None:
        assert_within_twice(dxa, plain.dxa, exact.dxa)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", NORMED)
def test_norms_err_at_most_twice_as_much_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    qkv, norms = drawn(case, dtype)[0], norms_of(case, dtype)
    ours = kernels.norm_rope(qkv, norms, angles(case), case.heads)
    plain = norm_rope(qkv, norms, angles(case), case.heads)
    wide = HeadNorms(norms.queries.double(), norms.keys.double(), norms.eps, norms.offset)
    exact = norm_rope(qkv.double(), wide, angles(case, torch.float64), case.heads)
    assert_within_twice(ours, torch.cat(plain, 1).flatten(1), torch.cat(exact, 1).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", NORMED)
def test_the_way_back_through_norms_errs_at_most_twice_as_much(case: Case, dtype: torch.dtype) -> None:
    qkv, norms = drawn(case, dtype)[0], norms_of(case, dtype)
    low = drawn(case, dtype)[2]
    queries, keys, width = case.heads
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(qkv.shape, generator=generator).to(dtype).unflatten(1, (-1, width))
    parts = gradient.split((queries, keys, keys), dim=1)
    dqkv, dxa, dnorms = kernels.rope_backward(*parts, angles(case), low, (qkv, norms, True))
    plain = rope_backward(*parts, angles(case), low, None, BeforeNorm(qkv, norms, wants_weights=True))
    wide = HeadNorms(norms.queries.double(), norms.keys.double(), norms.eps, norms.offset)
    before = BeforeNorm(qkv.double(), wide, wants_weights=True)
    wide_low = tuple(part.double() for part in low) if low else None
    exact = rope_backward(*(d.double() for d in parts), angles(case, torch.float64), wide_low, None, before)
    assert_within_twice(dqkv, plain.dqkv, exact.dqkv)
    if low is not None:
        assert_within_twice(dxa, plain.dxa, exact.dxa)
    for found, reference, wanted in zip(dnorms, plain.dnorms, exact.dnorms, strict=True):
        assert_within_twice(found, reference, wanted)
    frozen, _, nothing = kernels.rope_backward(*parts, angles(case), low, (qkv, norms, False))
    assert nothing is None
    assert torch.equal(frozen, dqkv)


@pytest.mark.parametrize("case", [CASES[1], CASES[5]])
def test_without_a_table_nothing_turns(case: Case) -> None:
    qkv, xa, low, bias = drawn(case, torch.float32)
    ours, plain = qkv.clone(), qkv.clone()
    kernels.rope(ours, xa, low, bias, None, case.heads)
    rope(plain, xa, low, bias, None, case.heads)
    torch.testing.assert_close(ours, plain)
    parts = qkv.unflatten(1, (-1, case.heads.width)).split((case.heads.queries, case.heads.keys, case.heads.keys), 1)
    dqkv, dxa, _ = kernels.rope_backward(*parts, None, low, None)
    assert torch.equal(dqkv, qkv)
    if low is not None:
        torch.testing.assert_close(dxa, rope_backward(*parts, None, low, None).dxa)
