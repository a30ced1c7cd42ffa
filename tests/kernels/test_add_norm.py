"""The kernels of the residual addition and its norm in the interpreter: within twice the error of plain PyTorch."""

from collections.abc import Iterator

import pytest
import torch

from burnish.kernels import add_norm as kernels
from burnish.ops import add_norm as ops
from burnish.ops.fp8 import quantise_rows
from tests.kernels.casts import right_casts

__all__ = ["right_casts"]
pytestmark = pytest.mark.usefixtures("poisoned", "right_casts")

# No bf16: the interpreter of Triton 3.6 multiplies its bits in a dot. Ranks are (added, reading).
DTYPES = [torch.float16, torch.float32]
SHAPES = [(1, 64, 16, 16), (17, 80, 16, 48), (4, 272, 32, 96), (3, 528, 128, 16)]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a value the kernel does not write shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *given, make=make, **options: poison(make(*given, **options)))


def poison(made: torch.Tensor) -> torch.Tensor:
    if made.element_size() == 1:
        made.view(torch.uint8).fill_(0x7F)
    else:
        made.fill_(float("nan"))
    return made


def parts(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    num_rows, width, added, reading = shape
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (num_rows, width), "y": (num_rows, width), "xa": (num_rows, added), "B": (width, added)}
    sizes |= {"A": (reading, width), "weight": (width,), "w_scale": (width,)}
    sizes |= {"dx_new": (num_rows, width), "dh": (num_rows, width), "dha": (num_rows, reading)}
    made = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    made |= {"B": 0.3 * made["B"], "A": made["A"] / width**0.5, "weight": 1 + 0.2 * made["weight"]}
    made |= {"w_scale": made["w_scale"].abs() + 0.1}
    for name in ("x", "y", "xa", "dx_new", "dh", "dha"):
        made[name][num_rows // 2 : num_rows - 1][:1] = 0  # a row of zeros among others
    return {name: part if name == "w_scale" else part.to(dtype) for name, part in made.items()}


def errs_no_more(ours: torch.Tensor | None, plain: torch.Tensor | None, exact: torch.Tensor | None) -> None:
    """At most twice the error of the same maths in plain PyTorch, and an allowance for sums in another order."""
    if ours is None or plain is None or exact is None:
        assert ours is None
        assert plain is None
        return
    assert ours.dtype == plain.dtype
    ours, plain = (ours.double() - exact).abs(), (plain.double() - exact).abs()
    assert ours.max() <= 2 * plain.max() + 2e-6 * exact.abs().max()
    assert ours.norm() <= 2 * plain.norm() + 2e-6 * exact.norm()


def same_bits(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


FORWARDS = {
    "all": ("y", "xa", "B", "A"),
    "no low rank": ("y",),
    "reading alone": ("y", "A"),
    "the first norm": ("A",),
}
BACKWARDS = {
    "all": ("dx_new", "dha", "A", "B", "w_scale"),
    "16 bits": ("dx_new", "dha", "A", "B"),
    "no low rank": ("dx_new", "w_scale"),
    "the last norm": ("B",),
    "the first norm": ("dx_new", "dha", "A"),
}


def cases(parts_present: dict[str, tuple[str, ...]]) -> Iterator[object]:
    """All parts in every shape, and every choice of parts in one shape."""
    for name, present in parts_present.items():
        for number, shape in enumerate(SHAPES if name == "all" else SHAPES[1:2]):
            for dtype in DTYPES if name == "all" else DTYPES[:1]:
                yield pytest.param(present, shape, dtype, number % 2, id=f"{name}-{shape}-{dtype}")


@pytest.mark.parametrize(("present", "shape", "dtype", "offset"), [*cases(FORWARDS)])
def test_forward(present: tuple[str, ...], shape: tuple[int, int, int, int], dtype: torch.dtype, offset: float) -> None:
    p = parts(shape, dtype)
    y, xa, B, A = (p[name] if name in present else None for name in ("y", "xa", "B", "A"))
    gain = ops.Gain(p["weight"], 1e-5, offset)
    stream, rstd, h, scale, ha = kernels.add_norm(p["x"], y, xa, B, *gain, A, fp8=False)
    plain = ops.reference_add_norm(p["x"], y, xa, B, gain, A, fp8=False)
    wide = [None if part is None else part.double() for part in (p["x"], y, xa, B, p["weight"], A)]
    exact = ops.reference_add_norm(*wide[:4], ops.Gain(wide[4], 1e-5, offset), wide[5], fp8=False)
    assert scale is None
    assert (stream is p["x"]) == (y is None)
    errs_no_more(stream, plain.x, exact.x)
    errs_no_more(rstd, plain.rstd, exact.rstd)
    errs_no_more(h, plain.h, exact.h)
    errs_no_more(ha, plain.ha, exact.ha)
    again, none = kernels.norm_again(stream, rstd, p["weight"], offset, fp8=False)
    assert none is None
    assert same_bits(again, h)

    short = kernels.add_norm(p["x"], y, xa, B, *gain, A, fp8=True)
    expected = quantise_rows(h)
    assert all(same_bits(one, other) for one, other in zip(short, (stream, rstd, *expected, ha), strict=True))
    assert all(map(same_bits, kernels.norm_again(stream, rstd, p["weight"], offset, fp8=True), expected))


@pytest.mark.parametrize(("present", "shape", "dtype", "offset"), [*cases(BACKWARDS)])
def test_backward(
    present: tuple[str, ...], shape: tuple[int, int, int, int], dtype: torch.dtype, offset: float
) -> None:
    p = parts(shape, dtype)
    gain = ops.Gain(p["weight"], 1e-5, offset)
    made = ops.reference_add_norm(p["x"], p["y"], p["xa"], p["B"], gain, p["A"], fp8=False)
    p |= {"x": made.x, "rstd": made.rstd}
    given = ops.NormBackward(p["dh"], p["x"], p["rstd"], **{name: p[name] for name in present})
    dx, dxa, dx8, scale, dweight = kernels.add_norm_backward(*given, *(gain.weight, gain.offset), wants_weight=True)
    plain = ops.reference_add_norm_backward(given, gain, wants_weight=True)
    wide = ops.NormBackward(*(None if part is None else part.double() for part in given))
    exact = ops.reference_add_norm_backward(wide, ops.Gain(p["weight"].double(), 1e-5, offset), wants_weight=True)
    errs_no_more(dx, plain.dx, exact.dx)
    errs_no_more(dxa, plain.dxa, exact.dxa)
    errs_no_more(dweight, plain.dweight, exact.dweight)
    expected = quantise_rows(dx, given.w_scale) if given.w_scale is not None else (None, None)
    assert same_bits(dx8, expected[0])
    assert same_bits(scale, expected[1])
    without = kernels.add_norm_backward(*given, *(gain.weight, gain.offset), wants_weight=False)
    assert without[4] is None
    assert all(map(same_bits, without[:4], (dx, dxa, dx8, scale)))


@pytest.mark.parametrize("fp8", [False, True])
def test_no_rows_at_all(fp8: bool) -> None:
    p = parts((0, 64, 16, 16), torch.float16)
    gain = ops.Gain(p["weight"], 1e-5, 0.0)
    stream, rstd, h, _, ha = kernels.add_norm(p["x"], p["y"], p["xa"], p["B"], *gain, p["A"], fp8)
    assert [part.shape for part in (stream, rstd, h, ha)] == [(0, 64), (0,), (0, 64), (0, 16)]
    assert kernels.norm_again(stream, rstd, p["weight"], 0.0, fp8)[0].shape == (0, 64)
    given = ops.NormBackward(p["dh"], stream, rstd, p["dx_new"], p["dha"], p["A"], p["B"], p["w_scale"])
    gradient = kernels.add_norm_backward(*given, p["weight"], 0.0, wants_weight=True)
    assert torch.equal(gradient[4], torch.zeros(64))
