"""The NF4 kernel in the interpreter, against the reference bit for bit."""

import pytest
import torch

from burnish.kernels import nf4 as kernels
from burnish.ops import nf4
from tests.kernels.casts import right_casts

__all__ = ["right_casts"]
pytestmark = pytest.mark.usefixtures("right_casts")
SHAPES = [(1, 1), (1, 64), (3, 5), (33, 70), (48, 80), (5, 1027), (130, 64)]


def quantised(shape: tuple[int, int], double: bool) -> nf4.Quantised:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return nf4.quantise(weight, double)


def by_kernel(parts: nf4.Quantised, dense: torch.Tensor) -> torch.Tensor:
    scales, nested = nf4.kernel_scales(parts.scales, parts.nested)
    return kernels.dequantise(parts.codes, scales, nested, nf4.tables(dense.device), dense.fill_(float("nan")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_reference_bit_for_bit(shape: tuple[int, int], double: bool, dtype: torch.dtype) -> None:
    parts = quantised(shape, double)
    dense = by_kernel(parts, torch.empty(shape, dtype=dtype))
    assert torch.equal(dense, nf4.reference_dequantise(*parts, shape, dtype))


def test_codes_that_start_at_any_byte_are_read() -> None:
    parts = quantised((4, 64), double=True)
    moved = torch.cat([parts.codes.new_zeros(1), parts.codes])[1:]
    dense = by_kernel(parts._replace(codes=moved), torch.empty(4, 64))
    assert torch.equal(dense, nf4.reference_dequantise(*parts, (4, 64), torch.float32))


def test_it_writes_rows_of_a_larger_weight_and_nothing_else() -> None:
    parts = quantised((7, 80), double=True)
    whole = torch.full((20, 80), 3.0)
    by_kernel(parts, whole[5:12])
    assert torch.equal(whole[5:12], nf4.reference_dequantise(*parts, (7, 80), torch.float32))
    assert bool((whole[:5] == 3).all())
    assert bool((whole[12:] == 3).all())
