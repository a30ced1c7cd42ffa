from collections import Counter
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.comparing import ComparisonStream, collate_comparisons
from burnish.data.comparisons import Comparisons
from burnish.data.packing import collate
from burnish.types import Comparison, PreferenceBatch, Sequence


def sequence(ids: str, prompt: int, row: int = 0) -> Sequence:
    """A letter is a token; the first `prompt` of them are not trained on."""
    return Sequence(tuple(map(ord, ids)), tuple(float(k >= prompt) for k in range(len(ids))), row)


PAIR = Comparison((sequence("promptAB", 6, 3), sequence("promptCDE", 6, 3)), ((0, 1, 0.5),))


def text(tokens: torch.Tensor) -> str:
    return "".join(chr(token) if token else "_" for token in tokens.tolist())


def test_a_shared_prompt_written_out():
    batch = collate_comparisons([PAIR, PAIR], share_prefix=True)
    # The t of the second answer stays its own: at it, C is predicted where the first answer has A.
    assert text(batch.tokens) == "promptABtCDE" * 2
    assert text(batch.targets) == "romptAB_CDE_" * 2
    assert batch.weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0] * 2
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8] * 2
    assert batch.sequence.tolist() == [0] * 8 + [1] * 4 + [2] * 8 + [3] * 4
    assert (batch.starts.tolist(), batch.starts.dtype) == ([0, 8, 12, 20, 24], torch.int32)
    assert batch.prefixes == ((0, 0), (0, 5), (12, 0), (12, 5))
    assert (batch.num_sequences, batch.longest, batch.total_weight, batch.rows) == (4, 9, 10.0, (3, 3, 3, 3))
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 2], [1, 3])
    assert (batch.margins.tolist(), batch.pair_weights.tolist()) == ([0.5, 0.5], [1.0, 1.0])
    assert (batch.num_pairs, batch.num_labels, batch.labels.tolist()) == (2.0, 0, [0, 0, 0, 0])


def test_without_sharing_it_is_a_batch_of_the_sequences():
    batch = collate_comparisons([PAIR], share_prefix=False)
    assert text(batch.tokens) == "promptABpromptCDE"
    assert batch.prefixes == ()
    plain = collate(PAIR.sequences)
    for name in ("tokens", "targets", "weights", "positions", "sequence", "starts", "scored"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))


def test_all_pairs_of_ranked_answers_weigh_as_much_as_one():
    answers = tuple(sequence(f"ask{answer}", 3) for answer in "ABCD")
    ranked = Comparison(answers, tuple((a, b, 0.0) for a in range(4) for b in range(a + 1, 4)))
    batch = collate_comparisons([PAIR, ranked])
    assert batch.pair_weights.tolist() == pytest.approx([1.0] + [1 / 6] * 6)
    assert float(batch.pair_weights.sum()) == pytest.approx(batch.num_pairs)
    assert batch.num_pairs == 2.0
    assert batch.chosen.tolist() == [0, 2, 2, 2, 3, 3, 4]
    assert batch.rejected.tolist() == [1, 3, 4, 5, 4, 5, 5]


def test_labels_of_a_batch():
    judged = Comparison((sequence("askA", 3), sequence("askZ", 3)), labels=(-1, 0))
    batch = collate_comparisons([PAIR, judged])
    assert batch.labels.tolist() == [0, 0, -1, 0]
    assert (batch.num_labels, batch.num_pairs, len(batch.chosen)) == (1, 1.0, 1)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        (("abX", 2), ("abY", 2), 1),
        (("abX", 2), ("abXY", 2), 1),  # answers that begin alike: what they share is not left out
        (("abcX", 1), ("abcY", 3), 0),  # the first answer is trained on from its second token
        (("aX", 1), ("aY", 1), 0),
        (("abcX", 3), ("aYcX", 3), 1),
        (("abc", 3), ("abc", 3), 2),  # nothing is trained: the last token is still its own
        (("X", 0), ("X", 0), 0),
    ],
)
def test_how_much_is_shared(first: tuple[str, int], second: tuple[str, int], shared: int):
    comparison = Comparison((sequence(*first), sequence(*second)), ((0, 1, 0.0),))
    corpus = Comparisons.of([comparison])
    assert corpus.shared.tolist() == [0, shared]
    batch = collate_comparisons([comparison])
    assert batch.prefixes == (((0, 0), (0, shared)) if shared else ())
    assert corpus.sizes(True).tolist() == [len(batch.tokens)]
    assert corpus.sizes(False).tolist() == corpus.lengths.tolist() == [len(first[0]) + len(second[0])]


def whole(batch: PreferenceBatch, name: str) -> list[list[Any]]:
    """A column of each sequence, with what it reads of another one in its place."""
    column, starts = getattr(batch, name).tolist(), batch.starts.tolist()
    prefixes = batch.prefixes or ((0, 0),) * batch.num_sequences
    return [
        column[start : start + length] + column[starts[number] : starts[number + 1]]
        for number, (start, length) in enumerate(prefixes)
    ]


tokens = st.lists(st.integers(1, 3), min_size=1, max_size=6)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    prompt, answers = draw(tokens), draw(st.lists(tokens, min_size=1, max_size=4))
    prompts = [prompt if draw(st.booleans()) else draw(tokens) for _ in answers]
    weights = [[draw(st.sampled_from([1.0, 1.0, 0.5, 0.0])) for _ in answer] for answer in answers]
    row = draw(st.integers(0, 9))
    sequences = tuple(
        Sequence((*p, *a), (*[0.0] * len(p), *w), row) for p, a, w in zip(prompts, answers, weights, strict=True)
    )
    places = [(a, b) for a in range(len(answers)) for b in range(len(answers)) if a != b]
    pairs = draw(st.lists(st.sampled_from(places), unique=True)) if places else []
    labels = draw(st.sampled_from([(), tuple(draw(st.sampled_from([-1, 0, 1])) for _ in answers)]))
    return Comparison(sequences, tuple((a, b, float(draw(st.integers(0, 3)))) for a, b in pairs), labels)


@settings(max_examples=200, deadline=None)
@given(st.lists(comparisons(), min_size=1, max_size=4))
def test_sharing_changes_nothing_that_a_sequence_reads_or_is_scored_on(listed: list[Comparison]):
    shared, apart = collate_comparisons(listed, share_prefix=True), collate_comparisons(listed, share_prefix=False)
    sequences = [sequence for comparison in listed for sequence in comparison.sequences]
    assert whole(shared, "tokens") == whole(apart, "tokens") == [list(sequence.ids) for sequence in sequences]
    assert whole(shared, "positions") == whole(apart, "positions")
    for name in ("targets", "weights"):
        own, full = getattr(shared, name).tolist(), whole(apart, name)
        starts = shared.starts.tolist()
        for number, (_, length) in enumerate(shared.prefixes or ((0, 0),) * len(sequences)):
            # What is left out weighs nothing, and the position before the first weighted token is not left out.
            assert own[starts[number] : starts[number + 1]] == full[number][length:]
            assert not any(whole(apart, "weights")[number][:length])
    for name in ("chosen", "rejected", "margins", "pair_weights", "labels"):
        assert torch.equal(getattr(shared, name), getattr(apart, name))
    for name in ("num_sequences", "longest", "total_weight", "rows", "num_pairs", "num_labels"):
        assert getattr(shared, name) == getattr(apart, name)
    assert [shared.targets[t].item() for t in shared.scored] == [apart.targets[t].item() for t in apart.scored]
    # Each prefix lies within the whole first sequence of the comparison.
    first = shared.starts.tolist()
    place = 0
    for comparison in listed:
        for number in range(place, place + len(comparison.sequences)):
            start, length = (shared.prefixes or ((0, 0),) * len(sequences))[number]
            assert length == 0 or (start == first[place] and number > place)
        place += len(comparison.sequences)


@settings(max_examples=100, deadline=None)
@given(st.lists(comparisons(), min_size=1, max_size=4), st.booleans())
def test_comparisons_in_arrays_are_the_list_they_were_made_of(listed: list[Comparison], labelled: bool):
    chosen = [Comparison(c.sequences, c.pairs, (1,) * len(c.sequences) if labelled else ()) for c in listed]
    corpus = Comparisons.of(chosen)
    assert list(corpus) == chosen
    assert corpus[-1] == chosen[-1]
    assert corpus[1:] == chosen[1:]
    assert list(Comparisons.from_arrays(corpus.arrays())) == chosen
    for share in (True, False):
        stored = [len(collate_comparisons([comparison], share).tokens) for comparison in chosen]
        assert corpus.sizes(share).tolist() == stored
    assert corpus.longest == max(len(s.ids) for c in chosen for s in c.sequences)
    with pytest.raises(IndexError):
        corpus[len(chosen)]


def some(lengths: list[int]) -> list[Comparison]:
    """Comparisons of a prompt of 4 tokens and two answers, one of one token and one of so many."""
    return [
        Comparison((sequence("askxA", 4, row), sequence("askx" + "B" * length, 4, row)), ((0, 1, 0.0),))
        for row, length in enumerate(lengths)
    ]


LENGTHS = [3, 9, 4, 4, 7, 2, 10, 5, 5, 6, 1, 8, 3, 3, 2, 7]


def rows(batches: list[PreferenceBatch]) -> list[int]:
    assert all(batch.rows[0::2] == batch.rows[1::2] for batch in batches)
    return [row for batch in batches for row in batch.rows[::2]]


@pytest.mark.parametrize(("share", "budget"), [(True, 16), (False, 19)])
def test_an_epoch_holds_every_comparison_once_and_packs_what_is_stored(share: bool, budget: int):
    stream = ComparisonStream(some(LENGTHS), budget, 1, seed=0, share_prefix=share)
    stored = [5 + 4 + length - (3 if share else 0) for length in LENGTHS]
    assert stream.num_packs >= sum(stored) / budget
    for epoch in range(2):
        steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
        batches = [batch for step in steps for batch in stream.step(step)]
        assert sorted(rows(batches)) == list(range(len(LENGTHS)))
        assert all(len(batch.tokens) <= budget for batch in batches)
        assert sum(len(batch.tokens) for batch in batches) == sum(stored)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_depends_on_its_number_alone_and_ranks_share_it(world: int):
    alone = ComparisonStream(some(LENGTHS), 20, world * 2, seed=1)
    together = [ComparisonStream(some(LENGTHS), 20, 2, seed=1, rank=rank, world=world) for rank in range(world)]
    assert {stream.fingerprint for stream in together} == {alone.fingerprint}
    seen: Counter[int] = Counter()
    for step in (5, 0, 3, 1, 2, 4):
        parts = [stream.step(step) for stream in together]
        assert sorted(row for part in parts for row in rows(part)) == sorted(rows(alone.step(step)))
        seen.update(rows(alone.step(step)))
    assert max(seen.values()) - min(seen.values()) <= 1
    other = [ComparisonStream(some(LENGTHS), 20, 2, seed=seed) for seed in (1, 2)]
    assert other[0].fingerprint != other[1].fingerprint
    assert any(rows(other[0].step(step)) != rows(other[1].step(step)) for step in range(4))


def test_what_is_compared_is_in_the_fingerprint():
    first = some(LENGTHS)
    swapped = [Comparison(first[0].sequences, ((1, 0, 0.0),)), *first[1:]]
    assert len({ComparisonStream(listed, 20, 1, seed=0).fingerprint for listed in (first, swapped, first)}) == 2


def test_comparisons_that_share_nothing_are_plain():
    apart = Comparison((sequence("aX", 1), sequence("bY", 1)), ((0, 1, 0.0),))
    batch = collate_comparisons([apart])
    assert batch.prefixes == ()
    assert numpy.array_equal(Comparisons.of([apart]).sizes(True), [4])
