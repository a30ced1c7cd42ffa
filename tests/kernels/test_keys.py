"""The kernels of shared keys in Triton's interpreter: against a loop in float64, with memory that holds rubbish."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from burnish.kernels import keys as kernels  # after Triton is known to be there


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a row no kernel writes shows."""
    empty = torch.empty

    def poison(*size: Any, **options: Any) -> Tensor:
        return empty(*size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poison)
    monkeypatch.setattr(kernels, "_COLUMNS", 32)


def slices(rows: int, groups: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as columns of one buffer, after three heads of queries."""
    buffer = torch.randn(rows, 3 + 2 * groups, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    _, k, v = buffer.split((3, groups, groups), dim=1)
    return k, v


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 2, 8), (2, 5, 16)])
def test_copies_are_the_rows_themselves(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    k, v = slices(*shape, dtype)
    position = torch.tensor([0, shape[0] - 1, 0, shape[0] // 2])
    for ours, x in zip(kernels.copy_out(k, v, position), (k, v), strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, x[position])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(1, 16), (2, 8), (5, 16)])
def test_sums_are_over_the_listed_copies_alone(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    dk, dv = (x.contiguous() for x in slices(7, *sizes, dtype))
    copies, copy_starts = torch.tensor([5, 0, 3, 1, 2, 0, 0]), torch.tensor([0, 1, 1, 4, 5, 5])  # copies 4, 6: no one's
    dk[4], dv[6] = float("nan"), float("inf")
    listed = [[5], [], [0, 3, 1], [2], []]
    for ours, d in zip(kernels.add_up(dk, dv, copies, copy_starts), (dk, dv), strict=True):
        exact = torch.stack([d[numbers].double().sum(0) for numbers in listed])
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=2e-7 if dtype == torch.float32 else 5e-4, atol=2e-7)


def test_nothing_gives_nothing() -> None:
    k, v = slices(4, 2, 8, torch.float16)
    none = torch.zeros(0, dtype=torch.int64)
    assert [x.shape for x in kernels.copy_out(k, v, none)] == [(0, 2, 8)] * 2
    assert [x.shape for x in kernels.add_up(k, v, none, torch.zeros(1, dtype=torch.int64))] == [(0, 2, 8)] * 2
