"""The kernel that gathers rows in Triton's interpreter: every row whole, in memory that held rubbish."""

import pytest
import torch

pytest.importorskip("triton")

from burnish.kernels import gather as kernels  # after Triton is known to be there


@pytest.mark.parametrize("columns", [16, 80, 2048, 4096 + 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_table(columns: int, dtype: torch.dtype) -> None:
    table = torch.randn(37, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = torch.tensor([0, 36, 5, 5, 17])
    assert torch.equal(kernels.gather_rows(table, places), torch.stack([table[int(place)] for place in places]))
    assert kernels.gather_rows(table, places[:0]).shape == (0, columns)


def test_a_place_outside_the_table_is_no_number() -> None:
    found = kernels.gather_rows(torch.ones(3, 20), torch.tensor([3, -1, 2]))
    assert bool(found[:2].isnan().all())
    assert bool((found[2] == 1).all())
