from collections import Counter

import pytest
import torch

from burnish.data.packing import pack
from burnish.data.stream import Stream
from burnish.types import Batch, Sequence


def some(lengths: list[int]) -> list[Sequence]:
    return [Sequence((row,) * length, (1.0,) * length, row) for row, length in enumerate(lengths)]


LENGTHS = [3, 9, 4, 4, 7, 2, 10, 5, 5, 6, 1, 8, 3, 3, 2, 7]


def rows(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.rows]


def test_an_epoch_holds_every_sequence_once():
    stream = Stream(some(LENGTHS), 10, 1, seed=0)
    assert stream.num_packs == len(pack(LENGTHS, 10)) == stream.steps_per_epoch
    for epoch in range(3):
        steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
        batches = [batch for step in steps for batch in stream.step(step)]
        assert sorted(rows(batches)) == list(range(len(LENGTHS)))
        assert all(len(batch.tokens) <= 10 for batch in batches)


def test_epochs_run_into_each_other_without_loss():
    stream = Stream(some(LENGTHS), 10, 3, seed=0)
    assert stream.steps_per_epoch == -(-stream.num_packs // 3)
    seen = Counter(row for step in range(stream.num_packs) for row in rows(stream.step(step)))
    assert set(seen.values()) == {3}  # num_packs steps of 3 packs are 3 epochs


def test_a_step_depends_on_its_number_alone():
    forward, other = (Stream(some(LENGTHS), 10, 2, seed=5) for _ in range(2))
    whole = [forward.step(step) for step in range(12)]
    for step in (11, 3, 7, 3, 0):
        for a, b in zip(other.step(step), whole[step], strict=True):
            assert a.rows == b.rows
            assert torch.equal(a.tokens, b.tokens)


def test_seeds_and_epochs_differ():
    def order(seed: int, epoch: int) -> list[int]:
        stream = Stream(some(LENGTHS), 10, 1, seed)
        first = epoch * stream.steps_per_epoch
        return [row for step in range(first, first + stream.steps_per_epoch) for row in rows(stream.step(step))]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_equally_long_sequences_change_company():
    stream = Stream(some([6, 6, 6, 4, 4, 4]), 10, 1, seed=0)
    company = {frozenset(batch.rows) for step in range(60) for batch in stream.step(step)}
    assert len(company) == 9  # every 6 with every 4, sooner or later


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_what_one_would_do(world: int):
    alone = Stream(some(LENGTHS), 10, world * 2, seed=1)
    together = [Stream(some(LENGTHS), 10, 2, seed=1, rank=rank, world=world) for rank in range(world)]
    assert all(stream.steps_per_epoch == alone.steps_per_epoch for stream in together)
    for step in range(6):
        parts = [stream.step(step) for stream in together]
        assert {len(part) for part in parts} == {2}
        assert sorted(row for part in parts for row in rows(part)) == sorted(rows(alone.step(step)))


def test_a_tiny_set_is_not_passed_over_twice_in_a_step():
    stream = Stream(some([3, 4]), 10, 8, seed=0)
    assert (stream.microbatches, stream.steps_per_epoch) == (1, 1)
    assert sorted(rows(stream.step(0))) == [0, 1]


def test_no_sequences_are_an_error():
    with pytest.raises(ValueError, match="no sequences to train on"):
        Stream([], 10, 1, seed=0)
