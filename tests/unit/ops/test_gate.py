"""The gate against autograd in float64, and what it is made of against what is rounded where."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from burnish.ops.fp8 import Quantised, quantise_rows
from burnish.ops.gate import Activation, GateBackward, Gated, gate, gate_backward
from burnish.ops.pointwise import gated

ACTIVATIONS: list[Activation] = ["silu", "gelu_tanh"]
ROWS, INNER, R = 7, 48, 16


def random(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(dtype: torch.dtype) -> GateBackward:
    shapes = [(ROWS, INNER), (ROWS, 2 * INNER), (ROWS, R), (R, INNER), (ROWS, 2 * R), (INNER, R), (INNER, R)]
    given = GateBackward(*(random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)))
    return given._replace(w_scale=random(2 * INNER, dtype=torch.float32, seed=9).abs())


def by_definition(given: GateBackward, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, ha) of autograd's own operations."""
    gate_TI, up_TI = given.gu.chunk(2, dim=1)
    if given.xa is not None and given.Bg is not None and given.Bu is not None:
        gate_TI = gate_TI + F.linear(given.xa[:, :R], given.Bg)
        up_TI = up_TI + F.linear(given.xa[:, R:], given.Bu)
    h_TI = gated(gate_TI, up_TI, activation)
    return h_TI, h_TI.new_zeros(()) if given.A_down is None else F.linear(h_TI, given.A_down)


def forward(given: GateBackward, activation: Activation, fp8: bool = False) -> Gated:
    return gate(given.gu, given.xa, given.Bg, given.Bu, given.A_down, activation, fp8)


WITHOUT: dict[str, Callable[[GateBackward], GateBackward]] = {
    "all": lambda given: given,
    "no low rank": lambda given: given._replace(dha=None, A_down=None, xa=None, Bg=None, Bu=None),
    "down alone": lambda given: given._replace(xa=None, Bg=None, Bu=None),
    "gate and up alone": lambda given: given._replace(dha=None, A_down=None),
}


@pytest.mark.parametrize("parts", WITHOUT)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_gradients_are_those_of_autograd(activation: Activation, parts: str) -> None:
    given = WITHOUT[parts](problem(torch.float64))._replace(w_scale=None)
    gu = given.gu.clone().requires_grad_()
    xa = None if given.xa is None else given.xa.clone().requires_grad_()
    h_TI, ha_TR = by_definition(given._replace(gu=gu, xa=xa), activation)
    total = (h_TI * given.dh).sum() + (0 if given.dha is None else (ha_TR * given.dha).sum())
    total.backward()

    made = forward(given, activation)
    torch.testing.assert_close(made.h, h_TI.detach())
    assert (made.ha is None) == (given.A_down is None)
    if made.ha is not None:
        torch.testing.assert_close(made.ha, ha_TR.detach())
    gradient = gate_backward(given, activation)
    torch.testing.assert_close(gradient.dgu, gu.grad)
    assert torch.equal(gradient.h, made.h)
    assert (gradient.dxa is None) == (xa is None)
    if xa is not None:
        torch.testing.assert_close(gradient.dxa, xa.grad)
    assert gradient.dgu8 is None
    assert made.h8 is None


def test_gradients_lie_in_the_memory_they_replace_and_all_else_is_left_alone() -> None:
    given = problem(torch.float32)
    kept = [None if part is None else part.clone() for part in given]
    made = forward(given, "silu")
    assert torch.equal(given.gu, kept[1])
    gradient = gate_backward(given, "silu")
    assert gradient.dgu.data_ptr() == given.gu.data_ptr()
    assert gradient.h.data_ptr() == given.dh.data_ptr()
    assert torch.equal(given.dh, made.h)
    for part, before in list(zip(given, kept, strict=True))[2:]:
        assert torch.equal(part, before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_is_rounded_once_at_each_of_the_named_places(activation: Activation) -> None:
    given = problem(torch.bfloat16)
    large = GateBackward(*(part.float() for part in given))
    g = (large.gu[:, :INNER] + large.xa[:, :R] @ large.Bg.T).bfloat16().float()
    u = (large.gu[:, INNER:] + large.xa[:, R:] @ large.Bu.T).bfloat16().float()
    h = gated(g, u, activation).bfloat16()
    made = forward(given, activation)
    # One step of bf16, where σ differs in its last bit; 1 + tanh loses all digits where a gate is all but shut.
    torch.testing.assert_close(made.h, h, rtol=2**-7, atol=2e-6)
    assert ((made.h != h) & (h.abs() > 1e-3)).float().mean() < 0.01
    torch.testing.assert_close(made.ha, (made.h.float() @ large.A_down.T).bfloat16(), rtol=2**-7, atol=1e-4)
    gradient = gate_backward(given, activation)
    dxa = torch.cat([gradient.dgu[:, :INNER].float() @ large.Bg, gradient.dgu[:, INNER:].float() @ large.Bu], dim=1)
    torch.testing.assert_close(gradient.dxa, dxa.bfloat16(), rtol=2**-7, atol=1e-4)


def near(made: Quantised | None, exact: torch.Tensor) -> None:
    assert made is not None
    assert made.values.dtype == torch.float8_e4m3fn
    error = made.values.float() * made.scale[:, None] - exact
    # Three bits of mantissa: half a step is 1/16 of the value, or of the smallest normal number.
    assert bool((error.abs() <= (exact.abs() / 16 + made.scale[:, None] * 2**-10) * 1.001).all())


def test_eight_bits_are_those_of_the_rounded_results() -> None:
    given = problem(torch.bfloat16)
    given.gu[3], given.xa[3] = 0, 0
    plain, made = forward(given, "silu"), forward(given, "silu", fp8=True)
    assert made.h is None
    assert plain.h is not None
    assert torch.equal(made.ha, plain.ha)
    near(made.h8, plain.h.float())
    assert made.h8 is not None
    assert made.h8.scale[3] == 1
    gradient = gate_backward(given, "silu")
    near(gradient.dgu8, gradient.dgu.float() * given.w_scale)
    expected = quantise_rows(gradient.dgu, given.w_scale)
    assert torch.equal(gradient.dgu8.scale, expected.scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_are_open_or_shut(activation: Activation) -> None:
    gu = torch.tensor([[60000.0, -60000.0, 200.0, -200.0, 1.0, 1.0, 1.0, 1.0]])
    h = gate(gu, None, None, None, None, activation, fp8=False).h
    torch.testing.assert_close(h, torch.tensor([[60000.0, 0.0, 200.0, 0.0]]))
    dgu = gate_backward(GateBackward(torch.ones(1, 4), gu), activation).dgu
    torch.testing.assert_close(dgu, torch.tensor([[1.0, 0.0, 1.0, 0.0, 60000.0, 0.0, 200.0, 0.0]]))
