import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.corpus import Corpus
from burnish.data.packing import collate, efficiency, pack
from burnish.types import Sequence

lengths_and_budget = (st.integers(1, 40) | st.integers(1000, 5000)).flatmap(
    lambda budget: st.tuples(st.lists(st.integers(1, budget), max_size=60), st.just(budget))
)


def first_fit_decreasing(lengths: list[int], budget: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((k for k, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(budget - length)
        else:
            rooms[place] -= length
    return len(rooms)


def fewest_packs(lengths: list[int], budget: int) -> int:
    """By trying every assignment."""
    best = len(lengths)
    for assignment in itertools.product(range(len(lengths)), repeat=len(lengths)):
        loads = numpy.bincount(assignment, lengths)
        if loads.max() <= budget:
            best = min(best, int(numpy.count_nonzero(loads)))
    return best


@settings(max_examples=200, deadline=None)
@given(lengths_and_budget)
def test_every_sequence_is_packed_once_within_the_budget(given: tuple[list[int], int]):
    lengths, budget = given
    packs = pack(lengths, budget)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    loads = sorted(sum(lengths[index] for index in members) for members in packs)
    assert all(0 < load <= budget for load in loads)
    # What any fit guarantees: no two packs could have been one, so at most one is half empty.
    assert all(a + b > budget for a, b in itertools.pairwise(loads))
    assert pack(lengths, budget) == packs
    # Best fit decreasing is within 11/9 of the optimum plus 6/9, and so within that of first fit decreasing.
    assert 9 * len(packs) <= 11 * first_fit_decreasing(lengths, budget) + 6
    assert pack(numpy.array(lengths, numpy.int64), budget) == packs


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=5))
def test_packs_are_near_the_fewest_possible(lengths: list[int]):
    assert 9 * len(pack(lengths, 10)) <= 11 * fewest_packs(lengths, 10) + 6


def test_each_goes_where_the_least_room_is_left():
    # 7 and 6 open packs with room 3 and 4; the 3 belongs in the first, the 4 in the second.
    assert sorted(map(sorted, pack([3, 7, 4, 6], 10))) == [[0, 1], [2, 3]]
    assert efficiency([3, 7, 4, 6], 10) == (2, 1.0)
    assert efficiency([5], 10) == (1, 0.5)
    assert pack([], 10) == []


def test_a_sequence_over_the_budget_is_an_error():
    with pytest.raises(ValueError, match="row 1 has 11 tokens, more than a batch of 10 tokens"):
        pack([3, 11], 10)


def test_many_sequences_pack_fast_and_full():
    lengths = numpy.random.default_rng(0).integers(16, 1024, 50_000)
    packs, full = efficiency(lengths, 4096)
    assert packs == pytest.approx(lengths.sum() / 4096, rel=0.001)
    assert full > 0.999


SEQUENCES = [
    Sequence((11, 12, 13), (0.0, 1.0, 0.5), row=4),
    Sequence((21,), (1.0,), row=0),
    Sequence((31, 32), (1.0, 1.0), row=2),
]


def test_a_batch_written_out():
    batch = collate(SEQUENCES)
    assert batch.tokens.tolist() == [11, 12, 13, 21, 31, 32]
    assert batch.targets.tolist() == [12, 13, 0, 0, 32, 0]
    assert batch.weights.tolist() == [1.0, 0.5, 0.0, 0.0, 1.0, 0.0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 2, 2]
    assert (batch.starts.tolist(), batch.starts.dtype) == ([0, 3, 4, 6], torch.int32)
    assert batch.scored.tolist() == [0, 1, 4]
    assert (batch.num_sequences, batch.longest, batch.total_weight, batch.rows) == (3, 3, 2.5, (4, 0, 2))


sequences = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=8).map(
        lambda pairs: Sequence(tuple(i for i, _ in pairs), tuple(w for _, w in pairs), row=len(pairs))
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(sequences)
def test_a_batch_is_its_sequences_one_at_a_time(listed: list[Sequence]):
    whole, alone = collate(listed), [collate([sequence]) for sequence in listed]
    for name in ("tokens", "targets", "weights", "positions"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(batch, name) for batch in alone]))
    assert whole.total_weight == sum(batch.total_weight for batch in alone)
    # A trained token is the target of the position before it, in its own sequence.
    expected = [(s.ids[k], s.weights[k]) for s in listed for k in range(1, len(s.ids)) if s.weights[k]]
    assert [(whole.targets[t].item(), whole.weights[t].item()) for t in whole.scored] == expected


@settings(max_examples=50, deadline=None)
@given(sequences)
def test_a_corpus_is_the_list_it_was_made_of(listed: list[Sequence]):
    corpus = Corpus.of(listed)
    assert list(corpus) == listed
    assert corpus[-1] == listed[-1]
    assert corpus[1:] == listed[1:]
    assert corpus.lengths.tolist() == [len(sequence.ids) for sequence in listed]
    with pytest.raises(IndexError):
        corpus[len(listed)]
