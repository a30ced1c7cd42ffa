"""The gate's kernels and that of low-rank gradients, compiled, at the shapes of 7B and 8B models and at odd ones."""

from typing import Any

import pytest
import torch

from burnish.ops.fp8 import Quantised
from burnish.ops.gate import Activation, GateBackward, gate, gate_backward, reference_gate, reference_gate_backward
from burnish.ops.outer import outer, reference_outer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES: list[tuple[tuple[int, int, int], torch.dtype, Activation]] = [
    ((1, 80, 16), torch.bfloat16, "silu"),
    ((17, 112, 16), torch.float16, "gelu_tanh"),
    ((300, 4864, 32), torch.bfloat16, "silu"),
    ((8192, 11008, 16), torch.bfloat16, "silu"),
    ((5003, 14336, 16), torch.bfloat16, "gelu_tanh"),
    ((1000, 11008, 64), torch.bfloat16, "silu"),
    ((300, 1024, 128), torch.bfloat16, "silu"),
    ((300, 1024, 256), torch.bfloat16, "silu"),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a value no kernel writes shows."""
    pytest.importorskip("triton")
    empty = torch.empty

    def poison(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        return made.fill_(float("nan")) if made.dtype in (torch.float32, torch.bfloat16, torch.float16) else made

    monkeypatch.setattr(torch, "empty", poison)


def problem(shape: tuple[int, int, int], dtype: torch.dtype) -> GateBackward:
    num_rows, inner, rank = shape
    generator = torch.Generator("cuda").manual_seed(num_rows + inner)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator, device="cuda") * scale).to(dtype)

    gu, dh, xa = random(num_rows, 2 * inner, scale=2.0), random(num_rows, inner), random(num_rows, 2 * rank)
    Bg, Bu = random(inner, rank, scale=rank**-0.5), random(inner, rank, scale=rank**-0.5)
    w_scale = torch.rand(2 * inner, generator=generator, device="cuda") + 0.5
    return GateBackward(dh, gu, random(num_rows, rank), random(rank, inner, scale=rank**-0.5), xa, Bg, Bu, w_scale)


def some_rows(given: GateBackward) -> tuple[torch.Tensor, GateBackward]:
    """The first rows and the last, whose results need no others, and what belongs to them."""
    num_rows = len(given.gu)
    kept = torch.arange(num_rows, device="cuda")
    kept = kept if num_rows <= 200 else torch.cat([kept[:100], kept[-100:]])
    by_row = {name: part[kept] for name in ("dh", "gu", "dha", "xa") if (part := getattr(given, name)) is not None}
    return kept, given._replace(**by_row)


def wide(given: GateBackward) -> GateBackward:
    return GateBackward(*(None if part is None else part.double() for part in given))


def no_worse(found: torch.Tensor | None, plain: torch.Tensor | None, exact: torch.Tensor | None) -> None:
    """At most twice the error of PyTorch in the same dtype."""
    assert found is not None
    assert plain is not None
    assert exact is not None
    assert found.dtype == plain.dtype
    error, allowed = (found.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    floor = {torch.float16: 2**-14, torch.bfloat16: 2**-11}[found.dtype] * float(exact.abs().max())
    assert error <= 2 * allowed + floor


def near(made: Quantised | None, exact: torch.Tensor) -> None:
    """Within half a step of e4m3, of a row's own scale."""
    assert made is not None
    torch.testing.assert_close(made.scale, exact.abs().amax(dim=1) / 448, rtol=1e-6, atol=0)
    error = made.values.float() * made.scale[:, None] - exact
    assert bool((error.abs() <= (exact.abs() / 16 + made.scale[:, None] * 2**-10) * 1.001).all())


@pytest.mark.parametrize(("shape", "dtype", "activation"), CASES)
def test_forward_and_backward(shape: tuple[int, int, int], dtype: torch.dtype, activation: Activation) -> None:
    given = problem(shape, dtype)
    kept, some = some_rows(given)
    made = gate(given.gu, given.xa, given.Bg, given.Bu, given.A_down, activation, fp8=False)
    eight = gate(given.gu, given.xa, given.Bg, given.Bu, given.A_down, activation, fp8=True)
    plain = reference_gate(some.gu, some.xa, some.Bg, some.Bu, some.A_down, activation, fp8=False)
    large = wide(some)
    exact = reference_gate(large.gu, large.xa, large.Bg, large.Bu, large.A_down, activation, fp8=False)
    assert made.h is not None
    assert made.ha is not None
    no_worse(made.h[kept], plain.h, exact.h)
    no_worse(made.ha[kept], plain.ha, exact.ha)
    assert eight.h is None
    assert torch.equal(eight.ha, made.ha)
    near(eight.h8, made.h.float())

    gradient = gate_backward(given, activation)
    assert torch.equal(gradient.h, made.h)  # bit for bit what the down projection read
    assert gradient.dgu.data_ptr() == given.gu.data_ptr()
    plain = reference_gate_backward(some, activation)
    exact = reference_gate_backward(large, activation)
    assert gradient.dxa is not None
    no_worse(gradient.dgu[kept], plain.dgu, exact.dgu)
    no_worse(gradient.dxa[kept], plain.dxa, exact.dxa)
    assert given.w_scale is not None
    near(gradient.dgu8, gradient.dgu.float() * given.w_scale)


@pytest.mark.parametrize("parts", ["none", "down", "gate_up"])
def test_low_rank_parts_may_be_absent(parts: str) -> None:
    given = problem((777, 11008, 16), torch.bfloat16)._replace(w_scale=None)
    if parts != "down":
        given = given._replace(dha=None, A_down=None)
    if parts != "gate_up":
        given = given._replace(xa=None, Bg=None, Bu=None)
    kept, some = some_rows(given)
    large = wide(some)
    made = gate(given.gu, given.xa, given.Bg, given.Bu, given.A_down, "silu", fp8=False)
    gradient = gate_backward(given, "silu")
    assert torch.equal(gradient.h, made.h)
    assert (made.ha is None) == (given.A_down is None)
    assert (gradient.dxa is None) == (given.xa is None)
    assert gradient.dgu8 is None
    no_worse(gradient.dgu[kept], reference_gate_backward(some, "silu").dgu, reference_gate_backward(large, "silu").dgu)


def test_the_same_numbers_come_out_each_time() -> None:
    given = problem((4096, 11008, 16), torch.bfloat16)
    runs = []
    for _ in range(3):
        copy = GateBackward(*(part.clone() for part in given))
        made = gate(copy.gu, copy.xa, copy.Bg, copy.Bu, copy.A_down, "silu", fp8=True)
        gradient = gate_backward(copy, "silu")
        runs.append((made.ha, gradient.dgu, gradient.dxa, gradient.h))
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (17, 80, 48), (300, 4096, 64), (8192, 4096, 16), (5003, 22016, 16), (2048, 12288, 256)]
)
def test_low_rank_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, width, rank = shape
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, width, generator=generator, device="cuda").to(dtype)
    z = torch.randn(rows, rank + 32, generator=generator, device="cuda").to(dtype)[:, 16 : 16 + rank]
    made = outer(x, z, (width,))
    assert made.dtype == torch.float32
    magnitude = x.abs().double().T @ z.abs().double()
    assert bool(((made - x.double().T @ z.double()).abs() <= magnitude * rows**0.5 * 2**-20).all())
    assert torch.equal(made, outer(x, z, (width,)))
    half = width // 2
    side, widths = x[:, half:], (width - half,)
    made, expected = outer(side, z, widths), reference_outer(side, z, widths)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=rows**0.5 * 1e-4)


@pytest.mark.parametrize("widths", [(4096, 4096, 4096), (11008, 11008), (4096, 1024, 1024), (896, 128, 128)])
def test_low_rank_gradients_of_joint_layers(widths: tuple[int, ...]) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(5003, sum(widths), generator=generator, device="cuda").bfloat16()
    z = torch.randn(5003, 16 * len(widths), generator=generator, device="cuda").bfloat16()
    made, parts = outer(x, z, widths), zip(x.split(widths, dim=1), z.split(16, dim=1), strict=True)
    exact = torch.cat([part.double().T @ thin.double() for part, thin in parts])
    torch.testing.assert_close(made.double(), exact, rtol=1e-4, atol=5003**0.5 * 1e-5)
