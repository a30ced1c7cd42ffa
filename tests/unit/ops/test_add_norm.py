"""The reference of the residual addition and its norm: against autograd in float64, and where it rounds."""

import pytest
import torch
from torch.nn import functional as F

from burnish.ops.add_norm import Gain, NormBackward, Normed, add_norm, add_norm_backward, norm_again
from burnish.ops.fp8 import FP8
from burnish.ops.pointwise import rms_norm

T, D, R, S = 7, 48, 16, 32  # S: ranks of the layers that read the norm


def parts(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """What can take part, drawn at random; the third token is all zeros."""
    torch.manual_seed(0)
    shapes = {"x": (T, D), "y": (T, D), "xa": (T, R), "B": (D, R), "A": (S, D), "weight": (D,)}
    shapes |= {"dx_new": (T, D), "dh": (T, D), "dha": (T, S)}
    made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    made["weight"] = 1 + 0.2 * made["weight"]
    for name in ("x", "y", "xa"):
        made[name][2] = 0
    return {name: part.to(dtype) for name, part in made.items()}


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("low_rank", [False, True])
def test_it_is_the_sum_and_its_norm(low_rank: bool, offset: float) -> None:
    p = parts()
    xa, B, A = (p["xa"], p["B"], p["A"]) if low_rank else (None, None, None)
    made = add_norm(p["x"], p["y"], xa, B, Gain(p["weight"], 1e-5, offset), A, fp8=False)
    total = p["x"] + p["y"] + (F.linear(p["xa"], p["B"]) if low_rank else 0)
    normed = F.rms_norm(total, (D,), p["weight"] + offset, 1e-5)
    torch.testing.assert_close(made.x, total)
    torch.testing.assert_close(made.h, normed)
    torch.testing.assert_close(made.rstd, (total.square().mean(1) + 1e-5) ** -0.5)
    assert made.h8 is None
    assert (made.ha is not None) == low_rank
    if made.ha is not None:
        torch.testing.assert_close(made.ha, F.linear(normed, p["A"]))


def test_with_nothing_to_add_the_stream_is_not_copied() -> None:
    p = parts()
    made = add_norm(p["x"], None, None, None, Gain(p["weight"], 1e-5, 0.0), None, fp8=False)
    assert made.x is p["x"]
    torch.testing.assert_close(made.h, F.rms_norm(p["x"], (D,), p["weight"], 1e-5))


@pytest.mark.parametrize("streams", [False, True], ids=["last norm", "in the stream"])
@pytest.mark.parametrize("read", [False, True], ids=["nothing reads", "low rank reads"])
@pytest.mark.parametrize("added", [False, True], ids=["nothing added", "low rank added"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_are_those_of_autograd(offset: float, added: bool, read: bool, streams: bool) -> None:
    p = parts()
    leaves = {name: p[name].clone().requires_grad_() for name in ("x", "y", "xa", "weight")}
    total = leaves["x"] + leaves["y"] + (F.linear(leaves["xa"], p["B"]) if added else 0)
    normed = F.rms_norm(total, (D,), leaves["weight"] + offset, 1e-5)
    loss = (normed * p["dh"]).sum() + ((total * p["dx_new"]).sum() if streams else 0)
    loss = loss + ((F.linear(normed, p["A"]) * p["dha"]).sum() if read else 0)
    loss.backward()

    gain = Gain(p["weight"], 1e-5, offset)
    low = (p["xa"], p["B"]) if added else (None, None)
    made = add_norm(p["x"], p["y"], *low, gain, p["A"] if read else None, fp8=False)
    given = NormBackward(p["dh"], made.x, made.rstd, B=low[1], dx_new=p["dx_new"] if streams else None)
    if read:
        given = given._replace(dha=p["dha"], A=p["A"])
    gradient = add_norm_backward(given, gain, wants_weight=True)
    torch.testing.assert_close(gradient.dx, leaves["x"].grad)
    torch.testing.assert_close(gradient.dx, leaves["y"].grad)
    torch.testing.assert_close(gradient.dweight, leaves["weight"].grad)
    assert (gradient.dxa is not None) == added
    if gradient.dxa is not None:
        torch.testing.assert_close(gradient.dxa, leaves["xa"].grad)
    assert gradient.dx8 is None
    assert add_norm_backward(given, gain, wants_weight=False).dweight is None


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_made_again_is_the_same_bit_for_bit(dtype: torch.dtype, fp8: bool) -> None:
    p = parts(dtype)
    gain = Gain(p["weight"], 1e-5, 0.0)
    made = add_norm(p["x"], p["y"], p["xa"], p["B"], gain, None, fp8)
    h, h8 = norm_again(made.x, made.rstd, gain, fp8)
    assert (h is None) == (made.h is None) == fp8
    assert (h8 is None) == (made.h8 is None) == (not fp8)
    if h is not None and made.h is not None:
        assert torch.equal(h, made.h)
    if h8 is not None and made.h8 is not None:
        assert torch.equal(h8.values.view(torch.uint8), made.h8.values.view(torch.uint8))
        assert torch.equal(h8.scale, made.h8.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_rounded_once_is_what_everything_after_it_reads(dtype: torch.dtype) -> None:
    p = parts(dtype)
    made = whole(p)
    total = p["x"].float() + p["y"].float() + p["xa"].float() @ p["B"].float().T
    assert torch.equal(made.x, total.to(dtype))
    assert made.rstd.dtype == torch.float32
    torch.testing.assert_close(made.rstd, (made.x.float().square().mean(1) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    assert made.h is not None
    torch.testing.assert_close(made.h, rms_norm(made.x, p["weight"], 1e-5), rtol=2**-7, atol=1e-6)
    assert torch.equal(made.ha, (made.h.float() @ p["A"].float().T).to(dtype))


def test_8_bits_are_those_of_the_rounded_norm() -> None:
    p = parts(torch.bfloat16)
    plain, short = whole(p), whole(p, fp8=True)
    assert short.h is None
    assert short.h8 is not None
    assert plain.h is not None
    assert short.h8.values.dtype == FP8
    assert torch.equal(short.h8.scale, torch.where(plain.h.any(1), plain.h.float().abs().amax(1) / 448, 1.0))
    back = short.h8.values.float() * short.h8.scale[:, None]
    # Three bits of mantissa: half a step is 1/16 of the value, or half of the smallest number, 2⁻⁹.
    assert ((back - plain.h.float()).abs() <= plain.h.float().abs() / 16 + short.h8.scale[:, None] * 2**-10).all()
    assert torch.equal(short.ha, plain.ha)


def test_the_gradient_in_8_bits_carries_the_scale_of_the_weight_it_meets() -> None:
    p = parts(torch.bfloat16)
    made = whole(p)
    w_scale = torch.rand(D) + 0.1
    given = NormBackward(p["dh"], made.x, made.rstd, p["dx_new"], p["dha"], p["A"], p["B"], w_scale)
    gradient = add_norm_backward(given, Gain(p["weight"], 1e-5, 0.0), wants_weight=False)
    assert gradient.dx8 is not None
    scaled = gradient.dx.float() * w_scale
    torch.testing.assert_close(gradient.dx8.scale, scaled.abs().amax(1) / 448)
    back = gradient.dx8.values.float() * gradient.dx8.scale[:, None]
    assert ((back - scaled).abs() <= scaled.abs() / 16 + gradient.dx8.scale[:, None] * 2**-10).all()
    assert torch.equal(gradient.dxa, (gradient.dx.float() @ p["B"].float()).to(torch.bfloat16))


def whole(p: dict[str, torch.Tensor], fp8: bool = False) -> Normed:
    return add_norm(p["x"], p["y"], p["xa"], p["B"], Gain(p["weight"], 1e-5, 0.0), p["A"], fp8)
