"""Keys and values of shared prompts on the GPU: copies and their gradients, which add up to the same each time."""

import pytest
import torch
from torch import Tensor

from burnish.ops.attention import attention_backward, attention_forward, packed_layout
from burnish.ops.keys import add_up, copy_out, keys_of, padded
from burnish.ops.sequences import sequence_sums
from tests.tiny import Groups, tiny_shared_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GROUPS: Groups = [(100, (40, 70, 3)), (7, (200, 1)), (129, (129, 128)), (64, (64,)), (1, (2, 2))]
SHAPES = [(32, 32, 128), (8, 2, 128), (6, 2, 80)]


def slices(total: int, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as columns of one buffer."""
    queries, keys, width = shape
    generator = torch.Generator("cuda").manual_seed(0)
    buffer = torch.randn(total, queries + 2 * keys, width, generator=generator, device="cuda").to(dtype)
    q, k, v = buffer.split((queries, keys, keys), dim=1)
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_copies_are_exact_and_sums_are_rounded_once(shape, dtype) -> None:
    batch = tiny_shared_batch(GROUPS)[1].to("cuda")
    whole, num_tokens = keys_of(batch), len(batch.tokens)
    for keys, rows in (
        (whole, num_tokens),
        (padded(whole, 20, len(whole.position) + 77, num_tokens + 9), num_tokens + 9),
    ):
        _, k, v = slices(rows, shape, dtype)
        copies = copy_out(k, v, keys)
        assert all(torch.equal(ours, x[keys.position]) for ours, x in zip(copies, (k, v), strict=True))
        given = [torch.randn(x.shape, device="cuda").to(dtype) for x in copies]
        known = slice(len(whole.position))
        for d in given:
            d[len(whole.position) :] = float("nan")  # what is no one's is not read
        for ours, d in zip(add_up(given[0], given[1], keys), given, strict=True):
            exact = torch.zeros(rows, *d.shape[1:], dtype=torch.float64, device="cuda")
            exact.index_add_(0, whole.position[known], d[known].double())
            torch.testing.assert_close(
                ours.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 2**-10, atol=1e-6
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_keys_and_values_are_the_same_each_time(shape) -> None:
    batch = tiny_shared_batch(GROUPS)[1].to("cuda")
    layout = packed_layout(batch, padded=False)
    given = slices(len(batch.tokens), shape, torch.bfloat16)
    dout = torch.randn(given[0].shape, device="cuda").bfloat16()
    out, saved = attention_forward(*given, layout, 0.125)
    found = [attention_backward(dout, given, out, saved, layout, 0.125)[1:] for _ in range(5)]
    for again in found[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(again, found[0], strict=True))


def test_sums_over_sequences_are_the_same_each_time() -> None:
    batch = tiny_shared_batch(GROUPS)[1].to("cuda")
    values = torch.randn(len(batch.tokens), generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    found = [sequence_sums(values, batch) for _ in range(5)]
    assert all(torch.equal(sums, found[0]) for sums in found)
    exact = [part.double().sum().item() for part in values.split(batch.starts.diff().tolist())]
    torch.testing.assert_close(found[0].double().cpu(), torch.tensor(exact, dtype=torch.float64), rtol=1e-5, atol=1e-4)
