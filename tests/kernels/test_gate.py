"""The gate's kernels in Triton's interpreter: within twice the error of plain PyTorch, memory that holds rubbish."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels import gate as kernels  # after Triton is known to be there
from burnish.ops.gate import Activation, GateBackward, reference_gate, reference_gate_backward

F16, F32 = torch.float16, torch.float32
CASES = [
    ((1, 16, 16), F16, "silu"),
    ((17, 80, 16), F32, "silu"),
    ((17, 80, 16), F16, "gelu_tanh"),
    ((70, 528, 16), F16, "silu"),
    ((70, 528, 32), F32, "gelu_tanh"),
    ((33, 112, 64), F16, "silu"),
    ((5, 48, 128), F16, "silu"),
]
"""T, I and the rank: rows, columns and spans that end before their block does."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a value no kernel writes shows."""
    empty = torch.empty

    def poison(*size: Any, **options: Any) -> torch.Tensor:
        return empty(*size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison)


def problem(shape: tuple[int, int, int], dtype: torch.dtype) -> GateBackward:
    """Everything that a pass reads, a row of zeros among it."""
    num_rows, inner, rank = shape
    generator = torch.Generator().manual_seed(num_rows + inner)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    gu, dh, xa = random(num_rows, 2 * inner, scale=2.0), random(num_rows, inner), random(num_rows, 2 * rank)
    gu[num_rows // 2], xa[num_rows // 2] = 0, 0
    Bg, Bu = random(inner, rank, scale=rank**-0.5), random(inner, rank, scale=rank**-0.5)
    return GateBackward(dh, gu, random(num_rows, rank), random(rank, inner, scale=rank**-0.5), xa, Bg, Bu)


def wide(given: GateBackward) -> GateBackward:
    return GateBackward(*(None if part is None else part.double() for part in given))


def copied(given: GateBackward) -> GateBackward:
    return GateBackward(*(None if part is None else part.clone() for part in given))


def no_worse(found: torch.Tensor | None, plain: torch.Tensor | None, exact: torch.Tensor | None) -> None:
    """At most twice the error of PyTorch in the same dtype."""
    assert found is not None
    assert plain is not None
    assert exact is not None
    assert found.dtype == plain.dtype
    error, allowed = (found.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    floor = {torch.float16: 2**-14, torch.float32: 2**-20}[found.dtype] * float(exact.abs().max())
    assert error <= 2 * allowed + floor


@pytest.mark.parametrize(("shape", "dtype", "activation"), CASES)
def test_forward(shape: tuple[int, int, int], dtype: torch.dtype, activation: Activation) -> None:
    given = problem(shape, dtype)
    parts = (given.gu, given.xa, given.Bg, given.Bu, given.A_down)
    h, ha = kernels.gate(*parts, activation)
    plain = reference_gate(*parts, activation, fp8=False)
    large = wide(given)
    exact = reference_gate(large.gu, large.xa, large.Bg, large.Bu, large.A_down, activation, fp8=False)
    no_worse(h, plain.h, exact.h)
    no_worse(ha, plain.ha, exact.ha)


@pytest.mark.parametrize(("shape", "dtype", "activation"), CASES)
def test_backward(shape: tuple[int, int, int], dtype: torch.dtype, activation: Activation) -> None:
    given = problem(shape, dtype)
    plain = reference_gate_backward(copied(given), activation)
    exact = reference_gate_backward(wide(given), activation)
    forward, _ = kernels.gate(given.gu, given.xa, given.Bg, given.Bu, None, activation)
    dxa = kernels.gate_backward(*given[:-1], activation)
    no_worse(given.gu, plain.dgu, exact.dgu)
    no_worse(dxa, plain.dxa, exact.dxa)
    assert torch.equal(given.dh, forward)


@pytest.mark.parametrize("rank_of", ["none", "down", "gate_up"])
def test_each_low_rank_part_may_be_absent(rank_of: str) -> None:
    given = problem((19, 80, 16), torch.float16)
    if rank_of != "down":
        given = given._replace(dha=None, A_down=None)
    if rank_of != "gate_up":
        given = given._replace(xa=None, Bg=None, Bu=None)
    h, ha = kernels.gate(given.gu, given.xa, given.Bg, given.Bu, given.A_down, "silu")
    exact = reference_gate(*(None if part is None else part.double() for part in (
        given.gu, given.xa, given.Bg, given.Bu, given.A_down)), "silu", fp8=False)  # fmt: skip
    plain = reference_gate(given.gu, given.xa, given.Bg, given.Bu, given.A_down, "silu", fp8=False)
    no_worse(h, plain.h, exact.h)
    assert (ha is None) == (given.A_down is None)
    if ha is not None:
        no_worse(ha, plain.ha, exact.ha)
    plain = reference_gate_backward(copied(given), "silu")
    exact = reference_gate_backward(wide(given), "silu")
    dxa = kernels.gate_backward(*given[:-1], "silu")
    assert (dxa is None) == (given.xa is None)
    no_worse(given.gu, plain.dgu, exact.dgu)
    no_worse(given.dh, plain.h, exact.h)


def test_the_bits_do_not_depend_on_how_often_it_is_asked() -> None:
    given = problem((70, 400, 16), torch.float16)
    first, second = copied(given), copied(given)
    one, two = kernels.gate_backward(*first[:-1], "silu"), kernels.gate_backward(*second[:-1], "silu")
    assert torch.equal(first.gu, second.gu)
    assert torch.equal(one, two)


def test_no_rows_give_nothing() -> None:
    given = problem((3, 48, 16), torch.float16)
    h, ha = kernels.gate(given.gu[:0], given.xa[:0], given.Bg, given.Bu, given.A_down, "silu")
    assert h.shape == (0, 48)
    assert ha.shape == (0, 16)
