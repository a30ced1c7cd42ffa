"""The kernels of the residual addition and its norm, compiled: real shapes, bf16, places beyond 2³¹."""

import pytest
import torch

from burnish.ops import add_norm as ops
from burnish.ops.fp8 import Quantised, quantise_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Triton warns about its own insides
]
SHAPES = [(1, 112, 16, 48), (300, 80, 16, 16), (8191, 4096, 16, 48), (17, 4096, 64, 192)]
"""Rows, width, rank of what is added, ranks of what reads."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a value the kernel does not write shows."""
    pytest.importorskip("triton")
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *given, make=make, **options: poison(make(*given, **options)))


def poison(made: torch.Tensor) -> torch.Tensor:
    if made.element_size() == 1:
        made.view(torch.uint8).fill_(0x7F)
    elif made.is_floating_point():
        made.fill_(float("nan"))
    return made


def parts(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    num_rows, width, added, reading = shape
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = {"x": (num_rows, width), "y": (num_rows, width), "xa": (num_rows, added), "B": (width, added)}
    sizes |= {"A": (reading, width), "weight": (width,), "w_scale": (width,)}
    sizes |= {"dx_new": (num_rows, width), "dh": (num_rows, width), "dha": (num_rows, reading)}
    made = {name: torch.randn(size, generator=generator, device="cuda") for name, size in sizes.items()}
    made |= {"B": 0.3 * made["B"], "A": made["A"] / width**0.5, "weight": 1 + 0.2 * made["weight"]}
    made |= {"w_scale": made["w_scale"].abs() + 0.1}
    for name in ("x", "y", "xa", "dx_new", "dh", "dha"):
        made[name][num_rows // 2 : num_rows - 1][:1] = 0  # a row of zeros among others
    return {name: part if name == "w_scale" else part.to(dtype) for name, part in made.items()}


def errs_no_more(ours: torch.Tensor | None, plain: torch.Tensor | None, exact: torch.Tensor | None) -> None:
    """At most twice the error of the same maths in plain PyTorch, and an allowance for sums in another order."""
    assert ours is not None
    assert plain is not None
    assert exact is not None
    assert ours.dtype == plain.dtype
    ours, plain = (ours.double() - exact).abs(), (plain.double() - exact).abs()
    assert ours.max() <= 2 * plain.max() + 1e-5 * exact.abs().max()
    assert ours.norm() <= 2 * plain.norm() + 1e-5 * exact.norm()


def same_bits(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def same_rows(ours: Quantised | None, theirs: Quantised) -> bool:
    return ours is not None and same_bits(ours.values, theirs.values) and same_bits(ours.scale, theirs.scale)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_errs_no_more_than_twice_what_pytorch_does(shape: tuple[int, int, int, int]) -> None:
    p = parts(shape)
    given, gain = (p["x"], p["y"], p["xa"], p["B"]), ops.Gain(p["weight"], 1e-5, 0.0)
    ours = ops.add_norm(*given, gain, p["A"], fp8=False)
    plain = ops.reference_add_norm(*given, gain, p["A"], fp8=False)
    wide = ops.Gain(p["weight"].double(), 1e-5, 0.0)
    exact = ops.reference_add_norm(*(part.double() for part in given), wide, p["A"].double(), fp8=False)
    errs_no_more(ours.x, plain.x, exact.x)
    errs_no_more(ours.rstd, plain.rstd, exact.rstd)
    errs_no_more(ours.h, plain.h, exact.h)
    errs_no_more(ours.ha, plain.ha, exact.ha)
    assert ours.h is not None
    assert same_bits(ops.norm_again(ours.x, ours.rstd, gain, fp8=False)[0], ours.h)
    # In 8 bits everything else is the same, and the bits are those of quantising the norm.
    short, expected = ops.add_norm(*given, gain, p["A"], fp8=True), quantise_rows(ours.h)
    assert short.h is None
    assert all(map(same_bits, (short.x, short.rstd, short.ha), (ours.x, ours.rstd, ours.ha)))
    assert same_rows(short.h8, expected)
    assert same_rows(ops.norm_again(ours.x, ours.rstd, gain, fp8=True)[1], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_errs_no_more_than_twice_what_pytorch_does(shape: tuple[int, int, int, int]) -> None:
    p = parts(shape)
    gain, wide_gain = ops.Gain(p["weight"], 1e-5, 0.0), ops.Gain(p["weight"].double(), 1e-5, 0.0)
    made = ops.reference_add_norm(p["x"], p["y"], p["xa"], p["B"], gain, p["A"], fp8=False)
    given = ops.NormBackward(
        p["dh"], made.x, made.rstd, p["dx_new"], p["dha"], p["A"], p["B"], p["w_scale"]
    )  # fmt: skip
    ours = ops.add_norm_backward(given, gain, wants_weight=True)
    plain = ops.reference_add_norm_backward(given, gain, wants_weight=True)
    wide = ops.NormBackward(*(None if part is None else part.double() for part in given))
    exact = ops.reference_add_norm_backward(wide, wide_gain, wants_weight=True)
    errs_no_more(ours.dx, plain.dx, exact.dx)
    errs_no_more(ours.dxa, plain.dxa, exact.dxa)
    errs_no_more(ours.dweight, plain.dweight, exact.dweight)
    assert same_rows(ours.dx8, quantise_rows(ours.dx, p["w_scale"]))
    again = ops.add_norm_backward(given, gain, wants_weight=True)
    assert all(map(same_bits, (again.dx, again.dxa, again.dweight), (ours.dx, ours.dxa, ours.dweight)))
    # In 16 bits: the same gradients.
    plain_bits = ops.add_norm_backward(given._replace(w_scale=None), gain, wants_weight=False)
    assert plain_bits.dx8 is None
    errs_no_more(plain_bits.dx, plain.dx, exact.dx)
    errs_no_more(plain_bits.dxa, plain.dxa, exact.dxa)


def test_without_low_rank_parts_in_either_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        p = parts((1000, 896, 16, 16), dtype)
        gain, wide_gain = ops.Gain(p["weight"], 1e-5, 1.0), ops.Gain(p["weight"].double(), 1e-5, 1.0)
        ours = ops.add_norm(p["x"], p["y"], None, None, gain, None, fp8=False)
        plain = ops.reference_add_norm(p["x"], p["y"], None, None, gain, None, fp8=False)
        exact = ops.reference_add_norm(p["x"].double(), p["y"].double(), None, None, wide_gain, None, fp8=False)
        errs_no_more(ours.h, plain.h, exact.h)
        assert ours.ha is None
        given = ops.NormBackward(p["dh"], plain.x, plain.rstd)
        wide = ops.NormBackward(p["dh"].double(), plain.x.double(), plain.rstd.double())
        gradient = ops.add_norm_backward(given, gain, wants_weight=False)
        plain_dx = ops.reference_add_norm_backward(given, gain, wants_weight=False).dx
        errs_no_more(gradient.dx, plain_dx, ops.reference_add_norm_backward(wide, wide_gain, wants_weight=False).dx)


def test_places_beyond_32_bits() -> None:
    num_rows, width = 2**17 + 40, 2**14
    x = torch.zeros(num_rows, width, dtype=torch.bfloat16, device="cuda")
    last = slice(num_rows - 56, None)
    p = parts((56, width, 16, 16))
    x[last] = p["x"]
    gain = ops.Gain(p["weight"], 1e-5, 0.0)
    whole = ops.add_norm(x, x, None, None, gain, p["A"], fp8=True)
    part = ops.add_norm(p["x"], p["x"], None, None, gain, p["A"], fp8=True)
    assert whole.h8 is not None
    assert whole.ha is not None
    assert part.h8 is not None
    assert same_bits(whole.x[last], part.x)
    assert same_bits(whole.ha[last], part.ha)
    assert same_rows(Quantised(whole.h8.values[last], whole.h8.scale[last]), part.h8)
    assert same_rows(
        Quantised(*(made[last] for made in ops.norm_again(whole.x, whole.rstd, gain, fp8=True)[1])), part.h8
    )
    dx = ops.add_norm_backward(ops.NormBackward(x, whole.x, whole.rstd), gain, wants_weight=False).dx
    part_dx = ops.add_norm_backward(ops.NormBackward(p["x"], part.x, part.rstd), gain, wants_weight=False).dx
    assert same_bits(dx[last], part_dx)
