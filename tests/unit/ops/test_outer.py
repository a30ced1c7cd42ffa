"""xᵀ z against float64."""

import pytest
import torch

from burnish.ops.outer import outer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_is_the_product_added_up_in_high_precision(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(300, size, generator=generator).to(dtype) for size in (40, 16))
    made = outer(x, z, (40,))
    assert made.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = torch.einsum("tn,tr->nr", x.double(), z.double())
    torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-4)


def test_slices_of_columns_are_taken_as_they_are() -> None:
    wide_x, wide_z = torch.randn(9, 96), torch.randn(9, 48)
    made = outer(wide_x[:, 32:64], wide_z[:, 16:32], (32,))
    torch.testing.assert_close(made, outer(wide_x, wide_z, (96,))[32:64, 16:32])


def test_no_rows_add_up_to_zero() -> None:
    assert torch.equal(outer(torch.ones(0, 32), torch.ones(0, 16), (32,)), torch.zeros(32, 16))


def test_each_part_is_multiplied_with_its_own_columns() -> None:
    x, z = torch.randn(9, 40, dtype=torch.float64), torch.randn(9, 12, dtype=torch.float64)
    made = outer(x, z, (24, 8, 8))
    torch.testing.assert_close(made[:24], torch.einsum("tn,tr->nr", x[:, :24], z[:, :4]))
    torch.testing.assert_close(made[24:32], torch.einsum("tn,tr->nr", x[:, 24:32], z[:, 4:8]))
    torch.testing.assert_close(made[32:], torch.einsum("tn,tr->nr", x[:, 32:], z[:, 8:]))
