"""Numbers per position made into numbers per sequence."""

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.types import Batch


def sequence_sums(values_T: Float[Tensor, " T"], batch: Batch) -> Float[Tensor, " S"]:
    """The sum of the values of each sequence, added up in one order: the same to the last bit each time."""
    if values_T.is_cuda:  # there one thread would add up a whole sequence, number by number
        return padded_sums(values_T, batch)
    return torch.segment_reduce(values_T, "sum", offsets=batch.starts)


def padded_sums(values_T: Float[Tensor, " T"], batch: Batch) -> Float[Tensor, " S"]:
    """The same by way of rows, a sequence each: S times the longest numbers for a moment."""
    places_T = torch.arange(len(values_T), device=values_T.device) - batch.starts[batch.sequence]
    rows_SL = values_T.new_zeros(batch.num_sequences, batch.longest)
    return rows_SL.index_put((batch.sequence, places_T), values_T).sum(dim=1)


def sequence_means(values_T: Float[Tensor, " T"], weights_T: Float[Tensor, " T"], batch: Batch) -> Float[Tensor, " S"]:
    """The weighted mean of the values of each sequence; 0 where all its weights are 0."""
    total_S = sequence_sums(weights_T, batch)
    sum_S = sequence_sums(values_T * weights_T, batch)
    return torch.where(total_S == 0, 0.0, sum_S / torch.where(total_S == 0, 1.0, total_S))


def sequence_last(values_T: Float[Tensor, "T ..."], batch: Batch) -> Float[Tensor, "S ..."]:
    """The value at the last position of each sequence."""
    return values_T[batch.starts[1:].long() - 1]
