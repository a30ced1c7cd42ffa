"""Which batches our own attention kernels take, and what recorded passes give them: the kernels by stand-ins."""

import pytest
import torch
from torch import Tensor

from burnish.model.blocks import Pass
from burnish.model.graphed import Key, _padded
from burnish.ops import attention as ops
from burnish.ops.attention import Layout, attention_backward, attention_forward, packed_layout
from burnish.ops.blocks import Blocks
from tests.tiny import tiny_batch, tiny_shared_batch


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """The direction and the window of each call of our kernels, on a GPU that has them."""
    calls: list[tuple[str, int | None]] = []

    def forward(q, k, v, blocks, scale, window) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert isinstance(blocks, Blocks)
        calls.append(("forward", window))
        return torch.ones_like(q), (q.new_zeros(q.shape[1], blocks.tables().num_sums),)

    def backward(dout, given, out, sums, blocks, scale, window) -> tuple[Tensor, ...]:
        assert sums.shape == (given[0].shape[1], blocks.tables().num_sums)
        calls.append(("backward", window))
        return given

    monkeypatch.setattr(ops, "forward_by_blocks", forward)
    monkeypatch.setattr(ops, "backward_by_blocks", backward)
    monkeypatch.setattr(ops, "_wants_blocks", lambda device: True)
    monkeypatch.setattr(ops, "_has_hopper_kernels", lambda device: True)
    return calls


def both_passes(layout: Layout, total: int, width: int, window: int | None) -> None:
    q, k, v = torch.zeros(total, 4, width).split((2, 1, 1), dim=1)
    out, saved = attention_forward(q, k, v, layout, 0.5, window)
    attention_backward(out, (q, k, v), out, saved, layout, 0.5, window)


@pytest.mark.parametrize(("window", "told"), [(None, None), (3, 3), (16, None), (15, 15)])
def test_ragged_batches_go_by_blocks(asked: list[tuple[str, int | None]], window, told) -> None:
    """A window that no sequence outgrows is none."""
    both_passes(packed_layout(tiny_batch([5, 9]), padded=False), 14, 128, window)
    assert asked == [("forward", told), ("backward", told)]


def test_shared_prompts_go_by_blocks(asked: list[tuple[str, int | None]]) -> None:
    _, batch, _ = tiny_shared_batch([(9, (4, 7)), (3, (8,))])
    both_passes(packed_layout(batch, padded=False), len(batch.tokens), 64, None)
    assert [direction for direction, _ in asked] == ["forward", "backward"]


def test_blocks_are_made_for_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed_layout(tiny_batch([5, 9]), padded=False).blocks is None
    monkeypatch.setattr(ops, "runs_kernels", lambda device: True)
    for capability, made in (((8, 9), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (packed_layout(tiny_batch([5, 9]), padded=False).blocks is not None) == made


@pytest.mark.parametrize("width", [32, 68, 192])
def test_heads_that_the_kernels_do_not_take_go_elsewhere(
    monkeypatch: pytest.MonkeyPatch, asked: list[object], width: int
) -> None:
    monkeypatch.setattr(ops, "_flash_forward", lambda q, *given: (q, (torch.zeros(2, len(q)),)))
    monkeypatch.setattr(ops, "_flash_backward", lambda dout, given, *rest: given)
    both_passes(packed_layout(tiny_batch([5, 9]), padded=False), 14, width, None)
    assert asked == []


@pytest.mark.parametrize("shared", [False, True])
def test_recorded_passes_take_blocks_of_the_padded_batch(asked: list[object], shared: bool) -> None:
    batch = tiny_shared_batch([(9, (4, 7)), (3, (8,))])[1] if shared else tiny_batch([5, 9, 17])
    total = len(batch.tokens)
    layout = packed_layout(batch, padded=False)
    table = torch.zeros(total, 2), torch.zeros(total, 2)
    key = Key(48, 8, 64, shared, 0, False, torch.float32, None, False, None)
    given = _padded(Pass((table,), layout, None), key)
    assert given.layout is not None
    assert given.layout.keys is None
    found = given.layout.blocks
    assert found is not None
    prefixes = None
    if shared:
        prefixes = torch.zeros(8, 2, dtype=torch.int32)
        prefixes[: len(batch.prefixes)] = torch.tensor(batch.prefixes)
    wanted = Blocks(given.layout.starts, 48, prefixes)
    for ours, theirs in zip(found.tables(), wanted.tables(), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_other_batches_are_listed_in_the_same_memory() -> None:
    starts = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 200, 500], [0, 450, 500])]
    blocks, other = (Blocks(each, 500) for each in starts)
    blocks.refill(other)  # nothing is listed yet, and nothing has been read
    before = blocks.tables()
    places = [table.data_ptr() for table in before[:3]]
    assert not torch.equal(before.queries, other.tables().queries)
    blocks.refill(other)
    for ours, theirs, place in zip(blocks.tables()[:3], other.tables()[:3], places, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() == place
        assert ours.dtype == torch.int32
