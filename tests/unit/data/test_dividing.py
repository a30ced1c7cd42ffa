"""Parts of a batch are the batches that their sequences alone would have made."""

import dataclasses
import re
from collections.abc import Sequence as Listed

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.comparing import collate_comparisons
from burnish.data.dividing import BY_PAIR, BY_POSITION, BY_SEQUENCE, in_two, within
from burnish.data.packing import collate
from burnish.types import Batch, Comparison, PreferenceBatch, RolloutBatch, Sequence


def sequence(number: int, prompt: int, answer: int, asked: int = 0) -> Sequence:
    """A prompt that says what was asked, and an answer of its own."""
    ids = (*(100 * asked + k for k in range(prompt)), *(10_000 + 100 * number + k for k in range(answer)))
    return Sequence(ids, (0.0,) * prompt + (1.0,) * answer, row=number)


def sequences(lengths: Listed[int]) -> list[Sequence]:
    return [sequence(number, 1, length - 1, asked=number) for number, length in enumerate(lengths)]


def unit(first: int, asked: int, answers: Listed[int], prompt: int = 6, labels: tuple[int, ...] = ()) -> Comparison:
    """Answers to one prompt: each is better than all that come after it, unless they have labels."""
    members = tuple(sequence(first + k, prompt, length, asked) for k, length in enumerate(answers))
    pairs = () if labels else tuple((a, b, 0.5 * b) for b in range(len(answers)) for a in range(b))
    return Comparison(members, pairs, labels)


def assert_same(found: Batch, expected: Batch) -> None:
    assert type(found) is type(expected)
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name
        elif isinstance(theirs, float):
            assert ours == pytest.approx(theirs, rel=1e-6), field.name
        else:
            assert ours == theirs, field.name


def halves(batch: Batch) -> tuple[Batch, Batch]:
    found = in_two(batch)
    assert found is not None
    return found


def test_a_batch_is_divided_between_sequences_near_its_middle():
    members = sequences([5, 3, 9, 4, 2])
    first, second = halves(collate(members))
    assert_same(first, collate(members[:2]))  # 8 of 23 tokens: nearer to the middle than 17
    assert_same(second, collate(members[2:]))


def test_what_is_one_cannot_be_divided():
    assert in_two(collate(sequences([40]))) is None
    assert in_two(collate_comparisons([unit(0, 0, [3, 4])])) is None
    assert in_two(collate_comparisons([unit(0, 0, [3, 4, 5, 6])], share_prefix=False)) is None


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_parts_keep_to_the_limit_and_to_the_order(lengths: list[int], limit: int):
    members = sequences(lengths)
    parts = within(collate(members), limit)
    begin = 0
    for part in parts:
        own = members[begin : begin + part.num_sequences]
        assert_same(part, collate(own))
        assert len(part.tokens) <= limit or part.num_sequences == 1
        begin += part.num_sequences
    assert begin == len(members)


def test_a_batch_within_the_limit_is_left_alone():
    batch = collate(sequences([5, 3]))
    assert within(batch, None) == [batch]
    assert within(batch, 8)[0] is batch


@pytest.mark.parametrize("share_prefix", [True, False])
@given(st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=5), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_comparisons_stay_whole(share_prefix: bool, answers: list[list[int]]):
    units, first = [], 0
    for asked, lengths in enumerate(answers):
        units.append(unit(first, asked, lengths))
        first += len(lengths)
    parts = within(collate_comparisons(units, share_prefix), 1)
    assert len(parts) == len(units)
    for part, one in zip(parts, units, strict=True):
        assert_same(part, collate_comparisons([one], share_prefix))
    left, right = halves(collate_comparisons(units, share_prefix))
    count = int(left.num_pairs)
    assert_same(left, collate_comparisons(units[:count], share_prefix))
    assert_same(right, collate_comparisons(units[count:], share_prefix))


def test_a_reference_goes_with_its_tokens():
    batch = collate_comparisons([unit(0, 0, [2, 3]), unit(2, 1, [4, 1])])
    known = torch.arange(float(len(batch.tokens)))
    parts = halves(dataclasses.replace(batch, reference_log_probs=known))
    assert torch.equal(torch.cat([part.reference_log_probs for part in parts]), known)
    assert halves(batch)[0].reference_log_probs is None


def test_labels_are_counted_anew():
    units = [unit(0, 0, [2, 3], labels=(1, 0)), unit(2, 1, [4, 1, 2, 2], labels=(-1, 1, 0, 0))]
    left, right = halves(collate_comparisons(units))
    assert_same(left, collate_comparisons(units[:1]))
    assert_same(right, collate_comparisons(units[1:]))
    assert (left.num_labels, right.num_labels) == (1, 2)


def test_who_shares_a_prompt_is_divided_last_and_takes_the_prompt_along():
    group, single = unit(0, 0, [9, 9, 9, 9], labels=(1, 0, 1, 0)), unit(4, 1, [3], labels=(1,))
    together = collate_comparisons([group, single])
    left, right = halves(together)  # far from the middle, but between prompts
    assert_same(left, collate_comparisons([group]))
    assert_same(right, collate_comparisons([single]))
    left, right = halves(left)
    parts = [Comparison(group.sequences[part], (), group.labels[part]) for part in (slice(2), slice(2, 4))]
    assert_same(left, collate_comparisons(parts[:1]))
    assert_same(right, collate_comparisons(parts[1:]))
    whole = [part.tokens.tolist() for part in within(together, 1)]
    assert whole == [list(member.ids) for member in (*group.sequences, *single.sequences)]


def test_readers_of_more_of_a_prompt_than_stands_there_get_the_rest():
    """The second sequence reads 3 tokens of the first, the third 6: without the first it can read 3 of the second."""
    base = collate_comparisons([unit(0, 0, [4, 4, 4], labels=(0, 0, 0))])
    assert base.prefixes == ((0, 0), (0, 5), (0, 5))
    tokens = [*range(10), *range(50, 57), *range(80, 84)]
    positions = [*range(10), *range(3, 10), *range(6, 10)]
    starts = [0, 10, 17, 21]
    numbers = torch.tensor([0] * 10 + [1] * 7 + [2] * 4)
    weights = torch.tensor([0.0] * 6 + [1.0] * 3 + [0.0] + [0.0] * 2 + [1.0] * 4 + [0.0] + [1.0] * 3 + [0.0])
    batch = Batch(
        tokens=torch.tensor(tokens),
        targets=torch.tensor([*tokens[1:10], 0, *tokens[11:17], 0, *tokens[18:21], 0]),
        weights=weights,
        positions=torch.tensor(positions),
        sequence=numbers,
        starts=torch.tensor(starts, dtype=torch.int32),
        scored=weights.nonzero()[:, 0],
        num_sequences=3,
        longest=10,
        total_weight=10.0,
        prefixes=((0, 0), (0, 3), (0, 6)),
    )
    left, right = halves(batch)
    assert left.tokens.tolist() == tokens[:10]
    assert right.tokens.tolist() == [0, 1, 2, *range(50, 57), 3, 4, 5, *range(80, 84)]
    assert right.targets.tolist() == [1, 2, *range(50, 57), 0, 4, 5, *range(80, 84), 0]
    assert right.positions.tolist() == [*range(10), *range(3, 10)]
    assert right.prefixes == ((0, 0), (0, 3))
    assert (right.starts.tolist(), right.longest, right.total_weight) == ([0, 10, 17], 10, 7.0)


def test_rollouts_keep_what_is_known_of_them():
    """Sequence by sequence, the columns of a divided batch at its weighted positions are those of the whole."""
    base = collate_comparisons([unit(0, 0, [3, 2, 5], labels=(0,) * 3), unit(3, 1, [7, 1], labels=(0,) * 2)])
    count = torch.arange(1.0, len(base.tokens) + 1)
    names = ["old_log_probs", "reference_log_probs", "old_values", "advantages", "returns", "value_weights"]
    batch = RolloutBatch(
        **{field.name: getattr(base, field.name) for field in dataclasses.fields(Batch)},
        scores=torch.tensor([0.5, float("nan"), 1.0, 2.0, 3.0]),
        groups=torch.tensor([0, 0, 0, 1, 1]),
        ended=torch.tensor([True, False, True, True, False]),
        **{name: (k + 1) * count * (base.weights != 0) for k, name in enumerate(names)},
    )
    parts = within(batch, 1)
    assert len(parts) == 5
    for number, part in enumerate(parts):
        assert torch.equal(part.scores, batch.scores[number : number + 1]) or number == 1
        assert (part.groups.item(), part.ended.item()) == (batch.groups[number].item(), batch.ended[number].item())
        own, there = part.weights != 0, (batch.weights != 0) & (batch.sequence == number)
        for name in [*names, "tokens", "targets", "positions"]:
            assert torch.equal(getattr(part, name)[own], getattr(batch, name)[there]), name
        assert not part.old_values[~own].any()
        assert part.prefixes == ()
    assert sum(part.total_weight for part in parts) == batch.total_weight


def test_every_column_of_every_kind_of_batch_is_known():
    """By the letters of the shapes; `sequence`, `starts` and `scored` are made anew."""
    found: dict[str, set[str]] = {}
    for kind in (Batch, PreferenceBatch, RolloutBatch):
        for field in dataclasses.fields(kind):
            letter = re.search(r"' ?(\S+)'\]", str(field.type))
            if letter:
                found.setdefault(letter[1], set()).add(field.name)
    assert found == {
        "T": BY_POSITION | {"sequence"},
        "S": BY_SEQUENCE,
        "P": BY_PAIR,
        "S+1": {"starts"},
        "K": {"scored"},
    }
