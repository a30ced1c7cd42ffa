"""Rows of a table that may lie on the host while what they are for is on the device."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding

from burnish.ops import runs_kernels


def gather_rows(table_VD: Float[Tensor, "V D"], places_T: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
    """Row places[t] of the table for each t, on the device of `places`.

    From pinned host memory a kernel reads the rows over the bus, and nobody waits: T · D numbers in place of the table.
    Raises IndexError for a place outside the table where PyTorch looks it up, as on the CPU.
    """
    if table_VD.device == places_T.device:
        return embedding(places_T, table_VD)
    assert not table_VD.requires_grad
    if runs_kernels(places_T.device) and table_VD.is_pinned():
        from burnish.kernels.gather import gather_rows as kernel

        return kernel(table_VD, places_T)
    return table_VD.index_select(0, places_T.to(table_VD.device)).to(places_T.device)
