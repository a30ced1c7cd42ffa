import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.ops.attention import (
    Group,
    attention,
    cached_attention,
    packed_layout,
    rotary_table,
    rotate,
    wants_padding,
)
from tests.tiny import tiny_batch


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float, window, softcap
) -> torch.Tensor:
    """Position by position, head by head, in Python."""
    out = torch.zeros_like(q)
    starts = [0, *itertools.accumulate(lengths)]
    heads_per_group = q.shape[1] // k.shape[1]
    for start, end in itertools.pairwise(starts):
        for t in range(start, end):
            first = start if window is None else max(start, t - window + 1)
            for head in range(q.shape[1]):
                group = head // heads_per_group
                scores = torch.stack([scale * q[t, head] @ k[s, group] for s in range(first, t + 1)])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[t, head] = scores.softmax(0) @ v[first : t + 1, group]
    return out


def random_qkv(total: int, heads: int, groups: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(total, heads, 6), (total, groups, 6), (total, groups, 6)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("lengths", [[5, 5], [9, 1, 4, 2], [1], [12, 3, 3]])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 1.0), (2, 1.5)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_packed_attention_is_the_definition(lengths, window, softcap, heads, groups) -> None:
    q, k, v = random_qkv(sum(lengths), heads, groups)
    layout = packed_layout(tiny_batch(lengths), padded=True)
    out = attention(q, k, v, layout, 0.7, window, softcap)
    torch.testing.assert_close(out, by_definition(q, k, v, lengths, 0.7, window, softcap))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (2, 1.5)])
def test_gradients_equal_those_of_the_definition(window, softcap) -> None:
    lengths = [7, 2, 4, 1]
    given = random_qkv(sum(lengths), 4, 2)
    gradients = []
    for function in ("packed", "definition"):
        q, k, v = (x.clone().requires_grad_() for x in given)
        if function == "packed":
            out = attention(q, k, v, packed_layout(tiny_batch(lengths), padded=True), 0.5, window, softcap)
        else:
            out = by_definition(q, k, v, lengths, 0.5, window, softcap)
        gradients.append(torch.autograd.grad(out.sin().sum(), (q, k, v)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_every_position_has_a_place_of_its_own_and_little_is_wasted(lengths: list[int]) -> None:
    layout = packed_layout(tiny_batch(lengths), padded=True)
    assert layout.rows is not None
    places = sum(group.num_rows * group.length for group in layout.rows.groups)
    assert sum(group.num_rows for group in layout.rows.groups) == len(lengths)
    assert places <= sum(lengths) / 0.6
    if layout.rows.place is not None:
        assert len(set(layout.rows.place.tolist())) == sum(lengths)
        assert int(layout.rows.place.max()) < places


def test_ragged_lengths_are_padded_in_groups() -> None:
    layout = packed_layout(tiny_batch([100, 2, 90, 3]), padded=True)
    assert layout.rows is not None
    assert layout.rows.groups == (Group(0, 2, 100), Group(200, 2, 3))


def test_the_layout_for_kernels_bounds_the_longest_by_a_power_of_two() -> None:
    layout = packed_layout(tiny_batch([100, 2]), padded=False)
    assert (layout.longest, layout.rows) == (128, None)
    assert packed_layout(tiny_batch([64]), padded=False).longest == 64


def test_kernels_are_for_half_precision_on_the_gpu_without_soft_caps() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert not wants_padding(gpu, torch.bfloat16, 128, None)
    assert wants_padding(cpu, torch.bfloat16, 128, None)
    assert wants_padding(gpu, torch.float32, 128, None)
    assert wants_padding(gpu, torch.bfloat16, 288, None)
    assert wants_padding(gpu, torch.bfloat16, 12, None)
    assert wants_padding(gpu, torch.bfloat16, 128, 50.0)


@pytest.mark.parametrize("shares_heads", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_is_asked_for_the_definition(monkeypatch, window, shares_heads) -> None:
    """What is handed to the variable-length kernel, by a stand-in with its interface: the kernel itself needs a GPU."""

    def kernel(q, k, v, starts_q, starts_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert starts_q.dtype == torch.int32
        assert max_q == max_k >= max(lengths)
        assert enable_gqa == (q.shape[1] != k.shape[1]) == shares_heads
        assert window_size[1] == 0
        reach = None if window_size[0] == -1 else window_size[0] + 1  # it counts the keys before the position itself
        return by_definition(q, k, v, starts_q.diff().tolist(), scale, reach, None)

    lengths = [5, 1, 7]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    q, k, v = random_qkv(13, 4, 2)
    layout = packed_layout(tiny_batch(lengths), padded=False)._replace(kernel_shares_heads=shares_heads)
    out = attention(q, k, v, layout, 0.7, window)
    torch.testing.assert_close(out, by_definition(q, k, v, lengths, 0.7, window, None))


@pytest.mark.parametrize("softcap", [None, 1.0])
def test_cached_attention_is_the_last_row_of_attention(softcap) -> None:
    lengths = [3, 6]
    q, k, v = random_qkv(9, 4, 2)
    full = by_definition(q, k, v, lengths, 0.4, None, softcap)
    held = [torch.zeros(2, 2, 8, 6, dtype=torch.float64) for _ in range(2)]
    for cache, x in zip(held, (k, v), strict=True):
        cache[0, :, :3], cache[1, :, :6] = x[:3].transpose(0, 1), x[3:].transpose(0, 1)
    seen = torch.arange(8) < torch.tensor([[3], [6]])
    out = cached_attention(q[[2, 8]], held[0], held[1], seen, 0.4, softcap)
    torch.testing.assert_close(out, full[[2, 8]])


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 10, generator=generator)
    positions, frequencies = torch.tensor([0, 1, 2, 7, 100]), (1.0, 0.3, 0.01)
    turned = rotate(x, rotary_table(positions, frequencies, scale=1.25))
    for t, position in enumerate(positions.tolist()):
        for i, frequency in enumerate(frequencies):
            number = (
                torch.complex(x[t, :, i], x[t, :, i + 3])
                * 1.25
                * complex(math.cos(position * frequency), math.sin(position * frequency))
            )
            torch.testing.assert_close(turned[t, :, i], number.real)
            torch.testing.assert_close(turned[t, :, i + 3], number.imag)
    assert torch.equal(turned[:, :, 6:], x[:, :, 6:])  # partial rotary: the rest is left alone
