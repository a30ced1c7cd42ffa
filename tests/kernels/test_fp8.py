"""The kernels to e4m3 in the interpreter, against the reference."""

import pytest
import torch

from burnish.kernels import fp8 as kernels
from burnish.ops import fp8, nf4
from tests.kernels.byte_picking import plain_bytes
from tests.kernels.casts import right_casts

__all__ = ["plain_bytes", "right_casts"]
pytestmark = pytest.mark.usefixtures("right_casts")
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(16, 16), (48, 80), (144, 208), (32, 528)]
IN_BLOCKS = [(16, 64), (48, 192), (144, 576)]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def equal(here: torch.Tensor, there: torch.Tensor) -> bool:
    return torch.equal(here.view(torch.uint8), there.view(torch.uint8))


def poisoned(shape: tuple[int, int], transposed: bool) -> torch.Tensor:
    """Bytes that are NaN where the kernel does not write."""
    return torch.full(shape[::-1] if transposed else shape, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (19, 80), (2, 176), (2, 256), (3, 2064)])
def test_rows_are_quantised_as_the_reference_does(rows: int, width: int, weighted: bool, dtype: torch.dtype) -> None:
    x = normal(rows, width, dtype=dtype) * 3
    x[0, 3] = 100
    x[-1] = 0
    w_scale = normal(width).abs() + 0.1 if weighted else None
    values, scale = kernels.quantise_rows(x, w_scale)
    expected = fp8.quantise_rows(x, w_scale)
    assert torch.equal(scale, expected.scale)
    assert equal(values, expected.values)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_long_row_is_quantised_in_parts(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w_scale = normal(2, 300, dtype=torch.bfloat16), normal(300).abs() + 0.1 if weighted else None
    whole = kernels.quantise_rows(x, w_scale)
    monkeypatch.setattr(kernels, "_STAYS", 128)
    held = kernels.quantise_rows(x, w_scale)
    monkeypatch.setattr(kernels, "_LONGEST", 128)
    parts = kernels.quantise_rows(x, w_scale)
    for made in (held, parts):
        assert equal(made[0], whole[0])
        assert torch.equal(made[1], whole[1])


def test_rows_next_to_zero_stay_finite() -> None:
    x = torch.full((2, 16), 1e-38, dtype=torch.bfloat16)
    x[1] = 1e-20
    values, scale = kernels.quantise_rows(x, None)
    assert scale[0] == 1
    assert values.float()[0].abs().max() == 0
    torch.testing.assert_close(values.float()[1] * scale[1], x[1].float())


def test_columns_of_a_wider_matrix_are_quantised() -> None:
    x = normal(5, 64, dtype=torch.float16)
    values, scale = kernels.quantise_rows(x[:, 16:48], None)
    expected = kernels.quantise_rows(x[:, 16:48].contiguous(), None)
    assert equal(values, expected[0])
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_dense_weight_becomes_the_references_bytes(
    shape: tuple[int, int], transposed: bool, dtype: torch.dtype
) -> None:
    w = normal(*shape, dtype=dtype)
    scale = fp8.weight_scale(w)
    made = kernels.dense_to_fp8(w, scale, transposed, poisoned(shape, transposed))
    assert equal(made, fp8.dense_to_fp8(w, scale, transposed))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", IN_BLOCKS)
@pytest.mark.usefixtures("plain_bytes")
def test_nf4_becomes_the_references_bytes(shape: tuple[int, int], transposed: bool, double: bool) -> None:
    parts = nf4.quantise(normal(*shape) * 0.02, double)
    scale = fp8.nf4_weight_scale(*parts, shape)
    given = (parts.codes, *nf4.kernel_scales(parts.scales, parts.nested))
    made = kernels.nf4_to_fp8(
        given, nf4.tables(parts.codes.device), shape, scale, transposed, poisoned(shape, transposed)
    )
    assert equal(made, fp8.nf4_to_fp8(*parts, shape, scale, transposed))


@pytest.mark.usefixtures("plain_bytes")
def test_transposed_weights_lie_side_by_side_in_one() -> None:
    shape = (48, 128)
    w = normal(*shape, dtype=torch.bfloat16)
    parts, scale = nf4.quantise(w.float()), fp8.weight_scale(w)
    whole = poisoned((32 + 2 * 48, 128), transposed=True)
    kernels.dense_to_fp8(w, scale, True, whole[:, 16:64])
    given = (parts.codes, *nf4.kernel_scales(parts.scales, parts.nested))
    kernels.nf4_to_fp8(given, nf4.tables(w.device), shape, scale, True, whole[:, 64:112])
    assert equal(whole[:, 16:64], fp8.dense_to_fp8(w, scale, True))
    assert equal(whole[:, 64:112], fp8.nf4_to_fp8(*parts, shape, scale, True))
    assert bool(whole.float()[:, :16].isnan().all())
    assert bool(whole.float()[:, 112:].isnan().all())
