"""Attention without autograd on the GPU: each library's kernels against float64, forward and backward."""

import pytest
import torch
from torch import Tensor

from burnish.ops.attention import Layout, attention, attention_backward, attention_forward, packed_layout
from tests.tiny import Groups, tiny_batch, tiny_shared_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the libraries warn about their own choices
]
GROUPS: Groups = [(100, (40, 70, 3)), (7, (200, 1)), (129, (129, 128)), (64, (64,)), (1, (2, 2))]
HEADS = [(8, 8, 64), (8, 2, 128), (6, 2, 80)]


def slices(total: int, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as columns of one buffer, as the model makes them."""
    queries, keys, width = heads
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(total, queries + 2 * keys, width, generator=generator)
    q, k, v = buffer.split((queries, keys, keys), dim=1)
    return q, k, v


def both_passes(
    given: tuple[Tensor, Tensor, Tensor], layout: Layout, dout: Tensor, window: int | None, dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The output and the gradients, and what was kept between them."""
    buffer = torch.cat([x.flatten(1) for x in given], dim=1).to("cuda", dtype)
    widths = [x.shape[1] * x.shape[2] for x in given]
    q, k, v = (part.unflatten(1, x.shape[1:]) for part, x in zip(buffer.split(widths, dim=1), given, strict=True))
    dout = dout.to("cuda", dtype)
    out, saved = attention_forward(q, k, v, layout, 0.125, window)
    return [out, *attention_backward(dout, (q, k, v), out, saved, layout, 0.125, window)], saved


def by_autograd(
    given: tuple[Tensor, Tensor, Tensor], layout: Layout, dout: Tensor, window: int | None, dtype: torch.dtype
) -> list[Tensor]:
    q, k, v = (x.to(dtype).requires_grad_() for x in given)
    out = attention(q, k, v, layout, 0.125, window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))]


def assert_within_twice(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert ours.is_contiguous()
        assert (ours.cpu().double() - true).norm() <= 2 * (theirs.double() - true).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("lengths", "window", "library"),
    [
        ([256, 256, 256], None, "cudnn"),
        ([256, 256, 256], 256, "cudnn"),
        ([256, 256, 256], None, "flash"),
        ([256, 256, 256], 50, "flash"),
        ([200, 200], None, "flash"),
        ([300, 1, 77, 128], None, "flash"),
        ([300, 1, 77, 128], 50, "flash"),
    ],
)
def test_each_library_errs_at_most_twice_as_much_as_plain_attention(lengths, window, library, heads, dtype) -> None:
    batch = tiny_batch(lengths)
    given, total = slices(sum(lengths), heads), sum(lengths)
    dout = torch.randn(total, heads[0], heads[2], generator=torch.Generator().manual_seed(1))
    layout = packed_layout(batch.to("cuda"), padded=False)
    if library == "flash":
        layout = layout._replace(even=False, blocks=None)
    found, saved = both_passes(given, layout, dout, window, dtype)
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    assert (saved[0].ndim > 2) == (library == "cudnn" and hopper)
    padded = packed_layout(batch, padded=True)
    plain, exact = (by_autograd(given, padded, dout, window, each) for each in (dtype, torch.float64))
    assert_within_twice(found, plain, exact)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 50])
def test_shared_prompts_err_at_most_twice_as_much_as_plain_attention(window, heads) -> None:
    _, shared, _ = tiny_shared_batch(GROUPS)
    given, total = slices(len(shared.tokens), heads), len(shared.tokens)
    dout = torch.randn(total, heads[0], heads[2], generator=torch.Generator().manual_seed(1))
    found, _ = both_passes(given, packed_layout(shared.to("cuda"), padded=False), dout, window, torch.bfloat16)
    padded = packed_layout(shared, padded=True)
    plain, exact = (by_autograd(given, padded, dout, window, each) for each in (torch.bfloat16, torch.float64))
    assert_within_twice(found, plain, exact)


@pytest.mark.parametrize("keys", [32, 8])
def test_the_libraries_agree_at_the_shapes_of_training(keys: int) -> None:
    layout = packed_layout(tiny_batch([2048] * 4).to("cuda"), padded=False)
    torch.manual_seed(0)
    buffer = torch.randn(8192, 32 + 2 * keys, 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = buffer.split((32, keys, keys), dim=1)
    dout = torch.randn(8192, 32, 128, device="cuda", dtype=torch.bfloat16)
    results: list[list[Tensor]] = []
    for each in (layout, layout._replace(even=False, blocks=None)):
        out, saved = attention_forward(q, k, v, each, 0.09)
        results.append([out, *attention_backward(dout, (q, k, v), out, saved, each, 0.09)])
    for one, other in zip(*results, strict=True):
        assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()


def test_padded_attention_has_the_gradients_of_autograd_in_half_precision() -> None:
    """A soft cap is out of the kernels' reach."""
    batch = tiny_batch([100, 33]).to("cuda")
    q, k, v = (x.to("cuda", torch.bfloat16) for x in slices(133, HEADS[0]))
    dout, layout = torch.randn_like(q), packed_layout(batch, padded=True)
    out, saved = attention_forward(q, k, v, layout, 0.125, None, 30.0)
    found = [out, *attention_backward(dout, (q, k, v), out, saved, layout, 0.125, None, 30.0)]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    again = attention(leaves[0], leaves[1], leaves[2], layout, 0.125, None, 30.0)
    for ours, theirs in zip(found, (again, *torch.autograd.grad(again, leaves, dout)), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-2, rtol=1e-2)
