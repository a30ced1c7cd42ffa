"""The references of rotation and what comes with it, against plain autograd in float64."""

import pytest
import torch

from burnish.ops.attention import rotary_table
from burnish.ops.fp8 import quantise_rows
from burnish.ops.rope import BeforeNorm, HeadNorms, Heads, norm_rope, rope, rope_backward

HEADS = Heads(queries=6, keys=2, width=10)
EPS = 0.01
FREQUENCIES = {"whole": (1.0, 0.5, 0.2, 0.1, 0.01), "part": (1.0, 0.3, 0.02)}


def drawn(total: int = 7, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = (HEADS.queries + 2 * HEADS.keys) * HEADS.width
    shapes = {"qkv": (total, width), "xa": (total, 3 * rank), "B": (width, rank), "bias": (width,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def angles(kind: str, total: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotary_table(torch.arange(total) * 3, FREQUENCIES[kind], scale=1.25)
    return cos.double(), sin.double()


def split(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    queries, keys, width = HEADS
    return x.split((queries * width, keys * width, keys * width), dim)


def by_definition(
    given: dict[str, torch.Tensor],
    table: tuple[torch.Tensor, torch.Tensor],
    gains: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """q, k and v, head by head and pair by pair, by complex multiplication; with gains q and k are normed first."""
    lifted = [a @ b.T for a, b in zip(given["xa"].chunk(3, 1), split(given["B"], 0), strict=True)]
    q, k, v = (x.unflatten(1, (-1, HEADS.width)) for x in split(given["qkv"] + torch.cat(lifted, 1) + given["bias"], 1))
    if gains is not None:
        q, k = (
            x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (1 + g) for x, g in zip((q, k), gains, strict=True)
        )
    number = torch.complex(*table)[:, None]
    count = number.shape[-1]
    turned: list[torch.Tensor] = []
    for x in (q, k):
        pairs = torch.complex(x[..., :count], x[..., count : 2 * count]) * number
        turned.append(torch.cat((pairs.real, pairs.imag, x[..., 2 * count :]), -1))
    return [*turned, v]


@pytest.mark.parametrize("kind", ["whole", "part"])
def test_values_and_gradients_are_those_of_the_definition(kind: str) -> None:
    given, table = drawn(), angles(kind)
    for x in given.values():
        x.requires_grad_()
    made = by_definition(given, table)
    ours = given["qkv"].detach().clone()
    Bs = tuple(b.detach().contiguous() for b in split(given["B"], 0))
    rope(ours, given["xa"].detach(), Bs, given["bias"].detach(), table, HEADS)
    torch.testing.assert_close(ours, torch.cat([x.flatten(1) for x in made], 1))
    arrived = [torch.randn_like(x.transpose(0, 1)).transpose(0, 1) for x in made]  # strides of another layout
    dqkv, dxa, dbias = torch.autograd.grad(made, (given["qkv"], given["xa"], given["bias"]), arrived)
    back = rope_backward(*arrived, table, Bs, None)
    torch.testing.assert_close(back.dqkv, dqkv)
    torch.testing.assert_close(back.dxa, dxa)
    torch.testing.assert_close(back.dqkv.sum(0), dbias)
    assert back.dqkv8 is None


def test_without_lora_and_bias_only_queries_and_keys_are_turned() -> None:
    given, table = drawn(), angles("part")
    ours = given["qkv"].clone()
    rope(ours, None, None, None, table, HEADS)
    q, k, v = by_definition({**given, "B": 0 * given["B"], "bias": 0 * given["bias"]}, table)
    torch.testing.assert_close(ours, torch.cat([x.flatten(1) for x in (q, k, v)], 1))
    back = rope_backward(q, k, v, table, None, None)
    assert back.dxa is None
    # A turn and its transpose: the square of the table's scale, for what is turned.
    again = back.dqkv.unflatten(1, (-1, HEADS.width))[:, : HEADS.queries, :6]
    torch.testing.assert_close(again, 1.25**2 * given["qkv"].unflatten(1, (-1, HEADS.width))[:, : HEADS.queries, :6])


def test_norms_of_heads_come_between_with_any_gains() -> None:
    given, table = drawn(), angles("whole")
    gains = drawn(seed=1)["bias"][:20].split(10)
    gains[0][3], gains[1][:] = -1, -1  # a gain is 1 + weight: from what is turned nothing could be read back
    leaves = [x.requires_grad_() for x in (given["qkv"], given["xa"], *(g.detach() for g in gains))]
    made = by_definition({**given, "qkv": leaves[0]}, table, (leaves[2], leaves[3]))
    Bs = tuple(b.contiguous() for b in split(given["B"], 0))
    norms = HeadNorms(gains[0], gains[1], EPS, 1.0)
    ours = given["qkv"].detach().clone()
    rope(ours, given["xa"].detach(), Bs, given["bias"], None, HEADS)
    lifted = [a @ b.T for a, b in zip(given["xa"].detach().chunk(3, 1), Bs, strict=True)]
    torch.testing.assert_close(ours, given["qkv"].detach() + torch.cat(lifted, 1) + given["bias"])
    for found, expected in zip(norm_rope(ours, norms, table, HEADS), made, strict=False):
        torch.testing.assert_close(found, expected)
    arrived = [torch.randn_like(x) for x in made]
    dqkv, dxa, *dgains = torch.autograd.grad(made, leaves, arrived)
    back = rope_backward(*arrived, table, Bs, None, BeforeNorm(ours, norms, wants_weights=True))
    torch.testing.assert_close(back.dqkv, dqkv)
    torch.testing.assert_close(back.dxa, dxa)
    assert back.dnorms is not None
    for found, expected in zip(back.dnorms, dgains, strict=True):
        assert expected.abs().min() > 0
        torch.testing.assert_close(found, expected)
    frozen = rope_backward(*arrived, table, Bs, None, BeforeNorm(ours, norms, wants_weights=False))
    assert frozen.dnorms is None
    assert torch.equal(frozen.dqkv, back.dqkv)


def test_without_a_table_nothing_turns() -> None:
    given = drawn()
    q, k, v = (x.unflatten(1, (-1, HEADS.width)) for x in split(given["qkv"], 1))
    Bs = tuple(b.contiguous() for b in split(given["B"], 0))
    back = rope_backward(q, k, v, None, Bs, None)
    assert torch.equal(back.dqkv, given["qkv"])
    pressed = [x.flatten(1) @ b for x, b in zip((q, k, v), Bs, strict=True)]
    torch.testing.assert_close(back.dxa, torch.cat(pressed, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) for name, x in drawn().items()}
    table = tuple(part.float() for part in angles("whole"))
    ours = given["qkv"].clone()
    rope(ours, given["xa"], tuple(b.contiguous() for b in split(given["B"], 0)), given["bias"], table, HEADS)
    wide = by_definition({name: x.double() for name, x in given.items()}, tuple(part.double() for part in table))
    exact = torch.cat([x.flatten(1) for x in wide], 1)
    assert ours.dtype == dtype
    # Half a unit of the last place, and what fp32 adds to it.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-5
    assert bool(((ours.double() - exact).abs() <= bound).all())
    lifted = given["qkv"].clone()
    rope(lifted, None, None, given["bias"], None, HEADS)
    gains = given["bias"][:10], given["bias"][10:20]
    made = norm_rope(lifted, HeadNorms(*gains, EPS, 1.0), table, HEADS)
    zeros = {name: torch.zeros_like(x).double() for name, x in given.items()}
    exact_table = tuple(part.double() for part in table)
    wide = by_definition({**zeros, "qkv": lifted.double()}, exact_table, tuple(g.double() for g in gains))
    for x, exact in zip(made, wide, strict=False):
        assert x.dtype == dtype
        bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-5
        assert bool(((x.double() - exact).abs() <= bound).all())


def test_the_gradient_comes_in_8_bits_too() -> None:
    made, table = drawn(), angles("whole")
    q, k, v = (x.unflatten(1, (-1, HEADS.width)) for x in split(made["qkv"].float(), 1))
    w_scale = made["bias"].abs().float()
    back = rope_backward(q, k, v, tuple(part.float() for part in table), None, w_scale)
    assert back.dqkv8 is not None
    expected = quantise_rows(back.dqkv, w_scale)
    assert torch.equal(back.dqkv8.scale, expected.scale)
    assert torch.equal(back.dqkv8.values.float(), expected.values.float())
    read_back = back.dqkv8.values.float() * back.dqkv8.scale[:, None]
    exact = back.dqkv * w_scale
    assert bool(((read_back - exact).abs() <= exact.abs() / 16 + back.dqkv8.scale[:, None] / 2**9).all())


def test_no_tokens_are_no_work() -> None:
    table = (torch.empty(0, 5), torch.empty(0, 5))
    rope(torch.empty(0, 100), None, None, None, table, HEADS)
    back = rope_backward(torch.empty(0, 6, 10), torch.empty(0, 2, 10), torch.empty(0, 2, 10), table, None, None)
    assert back.dqkv.shape == (0, 100)
    gains = HeadNorms(torch.ones(10), torch.ones(10), EPS, 0.0)
    assert norm_rope(torch.empty(0, 100), gains, table, HEADS)[1].shape == (0, 2, 10)
