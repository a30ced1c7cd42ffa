"""The kernel of xᵀ z in Triton's interpreter: against float64, with memory that holds rubbish."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels import outer as kernels  # after Triton is known to be there


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a sum no kernel writes shows."""
    empty = torch.empty

    def poison(*size: Any, **options: Any) -> torch.Tensor:
        return empty(*size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 16, 16), (17, 80, 32), (300, 112, 48), (700, 144, 64), (65, 272, 128), (9, 48, 256)]
)
def test_it_is_the_exact_product_up_to_the_rounding_of_fp32_sums(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, width, rank = shape
    generator = torch.Generator().manual_seed(rows)
    x, z = (torch.randn(rows, size, generator=generator).to(dtype) for size in (width, rank))
    made = kernels.outer(x, z, (width,))
    assert made.dtype == torch.float32
    assert made.shape == (width, rank)
    exact, magnitude = x.double().T @ z.double(), x.double().abs().T @ z.double().abs()
    # Products of two 11-bit numbers are exact in fp32; so only sums are rounded, each to 2^-24 of what they reached.
    assert bool(((made - exact).abs() <= magnitude * rows**0.5 * 2**-23).all())


def test_slices_of_columns_are_read_where_they_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(70, size, generator=generator).half() for size in (192, 96))
    made = kernels.outer(x[:, 16:112], z[:, 48:], (96,))
    torch.testing.assert_close(made, x[:, 16:112].float().T @ z[:, 48:].float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(made, kernels.outer(x[:, 16:112].contiguous(), z[:, 48:].contiguous(), (96,)))


def test_no_rows_add_up_to_zero() -> None:
    assert torch.equal(kernels.outer(torch.ones(0, 32), torch.ones(0, 16), (32,)), torch.zeros(32, 16))


@pytest.mark.parametrize("widths", [(144, 32, 32), (16, 144, 272), (8, 4, 4), (136, 136)])
def test_each_part_is_multiplied_with_its_own_columns(widths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(530, size, generator=generator).half() for size in (sum(widths), 16 * len(widths)))
    made = kernels.outer(x, z, widths)
    alone = zip(x.split(list(widths), dim=1), z.split(16, dim=1), strict=True)
    exact = torch.cat([part.double().T @ thin.double() for part, thin in alone])
    torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-4)
