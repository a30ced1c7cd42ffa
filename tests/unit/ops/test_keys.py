"""What sequences read of shared prompts, against lists made by hand; sums against autograd."""

import itertools

import pytest
import torch
from torch import Tensor

from burnish.ops import keys as ops
from burnish.ops.keys import Keys, add_up, copy_out, keys_of, padded
from tests.tiny import Groups, tiny_shared_batch

GROUPS: Groups = [(3, (2, 1, 2)), (1, (4,)), (2, (1, 3))]
READ = [
    *([0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 2, 6, 7]),
    *([8, 9, 10, 11, 12], [13, 14, 15], [13, 14, 16, 17, 18]),
]
"""The positions that each sequence of GROUPS reads."""


def made() -> Keys:
    return keys_of(tiny_shared_batch(GROUPS)[1])


def pair(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(rows, 4, 6, generator=generator, dtype=dtype).split((2, 2), dim=1)
    return k, v


def test_each_sequence_reads_its_prefix_and_then_itself() -> None:
    keys = made()
    parts = keys.position.tensor_split(keys.starts[1:-1].long())
    assert [part.tolist() for part in parts] == READ
    assert keys.starts.dtype == torch.int32


def test_the_copies_of_each_position_are_listed_in_order() -> None:
    keys, flat = made(), list(itertools.chain(*READ))
    starts = keys.copy_starts.tolist()
    listed = [keys.copies[first:last].tolist() for first, last in itertools.pairwise(starts)]
    assert listed == [[at for at, read in enumerate(flat) if read == position] for position in range(19)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_copies_add_up_as_autograd_adds_them(dtype: torch.dtype) -> None:
    keys = made()
    k, v = (x.detach().requires_grad_() for x in pair(19, dtype))
    copies = copy_out(k, v, keys)
    given = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for x in copies]
    k64, v64 = (x.detach().double().requires_grad_() for x in (k, v))
    exact = torch.autograd.grad(copy_out(k64, v64, keys), (k64, v64), [d.double() for d in given])
    for ours, wanted in zip(add_up(given[0], given[1], keys), exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, wanted.to(dtype))  # bf16: rounded once


def test_padding_reads_one_position_and_gives_nothing_back() -> None:
    keys = made()
    more = padded(keys, 9, 40, 24)
    assert [len(part) for part in more] == [40, 10, 40, 25]
    assert more.position[len(keys.position) :].tolist() == [23] * 13
    assert more.starts.tolist() == [*keys.starts.tolist(), 40, 40, 40]
    k, v = pair(24)
    copies = copy_out(k, v, more)
    expected = add_up(*(x[:27].contiguous() for x in copies), keys)
    copies[0][27:], copies[1][27:] = float("nan"), float("inf")
    for ours, wanted in zip(add_up(*copies, more), expected, strict=True):
        assert torch.equal(ours[:19], wanted)
        assert torch.equal(ours[19:], torch.zeros(5, 2, 6, dtype=torch.float64))


def test_the_kernels_are_asked_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("burnish.kernels.keys")
    keys, (k, v), asked = made(), pair(19, torch.float16), []
    monkeypatch.setattr(ops, "takes_kernel", lambda x: asked.append(x.dtype) or True)
    monkeypatch.setattr(kernels, "copy_out", lambda k, v, position: (k[position], v[position]))
    monkeypatch.setattr(kernels, "add_up", lambda dk, dv, copies, copy_starts: (copies, copy_starts))
    copies = copy_out(k, v, keys)
    assert torch.equal(copies[1], v[keys.position])
    assert add_up(*copies, keys) == (keys.copies, keys.copy_starts)
    assert asked == [torch.float16] * 2
