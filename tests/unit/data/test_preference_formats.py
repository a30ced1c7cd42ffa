"""Layouts of compared answers in the wild, read into prompts, answers and places."""

from typing import Any

import pytest

from burnish.data.answers import conversation, repair_answers
from burnish.data.formats import FORMATS, recognise
from burnish.types import Judged, Message, Preference


def said(turns: tuple[Message, ...]) -> list[str]:
    return [f"{turn.role[0]}:{turn.content}" for turn in turns]


def turns(*spoken: str) -> list[dict[str, str]]:
    """Messages written as `u:Hello`."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[text[0]], "content": text[2:]} for text in spoken]


def read(row: dict[str, Any]) -> Preference | Judged:
    reading = FORMATS[recognise([row])].read(row)
    assert isinstance(reading, Preference | Judged)
    return reading


def pair(row: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    reading = read(row)
    assert isinstance(reading, Preference)
    assert reading.ranks == (0, 1)
    return said(reading.prompt), said(reading.answers[0]), said(reading.answers[1])


ULTRAFEEDBACK = {
    "prompt": "Q?",
    "prompt_id": "0f",
    "chosen": turns("u:Q?", "a:yes"),
    "rejected": turns("u:Q?", "a:no"),
    "messages": turns("u:Q?", "a:yes"),
    "score_chosen": 8.0,
    "score_rejected": 7.5,
}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q?", "chosen": " yes", "rejected": "no "}, (["u:Q?"], ["a: yes"], ["a:no "])),
        (ULTRAFEEDBACK, (["u:Q?"], ["a:yes"], ["a:no"])),
        (
            {"prompt": turns("s:be", "u:Q?"), "chosen": turns("a:yes"), "rejected": turns("a:no")},
            (["s:be", "u:Q?"], ["a:yes"], ["a:no"]),
        ),
        (
            {"prompt": turns("u:Q?"), "chosen": {"role": "assistant", "content": "yes"}, "rejected": "no"},
            (["u:Q?"], ["a:yes"], ["a:no"]),
        ),
        # A repeated prompt may have a system turn before it.
        (
            {"prompt": "Q? ", "chosen": turns("s:be", "u:Q?", "a:yes"), "rejected": turns("s:be", "u:Q?", "a:no")},
            (["s:be", "u:Q?"], ["a:yes"], ["a:no"]),
        ),
        (
            {"system": "be", "question": "Q?", "chosen": "yes", "rejected": "no"},
            (["s:be", "u:Q?"], ["a:yes"], ["a:no"]),
        ),
        (
            {"instruction": "Sort.", "input": "b a", "chosen": "a b", "rejected": "b a"},
            (["u:Sort.\n\nb a"], ["a:a b"], ["a:b a"]),
        ),
        (
            {
                "prompt": [{"from": "human", "value": "Q?"}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
            },
            (["u:Q?"], ["a:yes"], ["a:no"]),
        ),
        # Anthropic's dialogues, with a prompt column and without.
        (
            {"prompt": "\n\nHuman: Q?\n\nAssistant:", "chosen": " yes", "rejected": " no"},
            (["u:Q?"], ["a:yes"], ["a:no"]),
        ),
        (
            {
                "chosen": "\n\nHuman: Q?\n\nAssistant: A.\n\nHuman: R?\nS?\n\nAssistant: yes\n\nof course",
                "rejected": "\n\nHuman: Q?\n\nAssistant: A.\n\nHuman: R?\nS?\n\nAssistant: no",
            },
            (["u:Q?", "a:A.", "u:R?\nS?"], ["a:yes\n\nof course"], ["a:no"]),
        ),
        # Whole conversations: what they begin with in common is the prompt, and never all of one of them.
        (
            {"chosen": turns("u:Q?", "a:A."), "rejected": turns("u:Q?", "a:A.", "u:R?", "a:B.")},
            (["u:Q?"], ["a:A."], ["a:A.", "u:R?", "a:B."]),
        ),
        (
            {"chosen": turns("u:Q?", "a:A.", "u:R?", "a:B."), "rejected": turns("u:Q?", "a:A.", "u:S?", "a:C.")},
            (["u:Q?", "a:A."], ["u:R?", "a:B."], ["u:S?", "a:C."]),
        ),
        (
            {"chosen": turns("u:Q?", "a:yes"), "rejected": turns("u:P?", "a:no")},
            ([], ["u:Q?", "a:yes"], ["u:P?", "a:no"]),
        ),
    ],
)
def test_pairs_in_the_wild(row: dict[str, Any], expected: tuple[list[str], list[str], list[str]]):
    assert pair(row) == expected


@pytest.mark.parametrize(
    ("columns", "ranks"),
    [
        ({"ranks": [2, 1, 3]}, (1, 0, 2)),
        ({"rankings": [1, 1, 2]}, (0, 0, 1)),
        ({"scores": [0.5, 2, -1]}, (1, 0, 2)),
        ({"scores": [3, 3, 3]}, (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("column", ["answers", "responses"])
def test_ranked_answers(column: str, columns: dict[str, Any], ranks: tuple[int, ...]):
    reading = read({"prompt": "Q?", column: ["x", "y", "z"], **columns})
    assert isinstance(reading, Preference)
    assert (said(reading.prompt), reading.ranks) == (["u:Q?"], ranks)
    assert [said(answer) for answer in reading.answers] == [["a:x"], ["a:y"], ["a:z"]]


def test_answers_that_carry_their_own_rank():
    nectar = {
        "prompt": "\n\nHuman: Q?\n\nAssistant: ",
        "answers": [{"answer": "x", "model": "m", "rank": 3.0}, {"answer": "y", "model": "n", "rank": 1.0}],
    }
    reading = read(nectar)
    assert isinstance(reading, Preference)
    assert (said(reading.prompt), reading.ranks) == (["u:Q?"], (1, 0))
    assert [said(answer) for answer in reading.answers] == [["a:x"], ["a:y"]]


def test_a_labelled_answer():
    for label, wanted in ((True, True), (False, False), (1, True), (0, False)):
        reading = read({"prompt": turns("u:Q?"), "completion": turns("a:x"), "label": label})
        assert reading == Judged((Message("user", "Q?"),), (Message("assistant", "x"),), wanted)


def test_margins_and_ties_by_score():
    row = {"prompt": "Q?", "chosen": "x", "rejected": "y"}
    assert read({**row, "margin": 1.5}) == read(row).__class__(
        (Message("user", "Q?"),), ((Message("assistant", "x"),), (Message("assistant", "y"),)), (0, 1), 1.5
    )
    tied = read({**row, "score_chosen": 3, "score_rejected": 3})
    assert isinstance(tied, Preference)
    assert tied.ranks == (0, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "yes", "rejected": "no"}, "`chosen` is text in a row without a prompt: write a `prompt` column"),
        ({"prompt": "Q?", "chosen": "x", "rejected": "y", "margin": -1}, "`margin` should be a number of at least 0"),
        ({"prompt": "Q?", "chosen": "x", "rejected": "y", "margin": "big"}, "`margin` should hold numbers, not text"),
        (
            {"prompt": "Q?", "chosen": "x", "rejected": "y", "score_chosen": 1, "score_rejected": 2},
            "`score_chosen` is 1 and `score_rejected` is 2, more: swap the answers",
        ),
        (
            {"prompt": "Q?", "chosen": turns("u:P?", "a:x"), "rejected": turns("u:P?", "a:y")},
            "`chosen` begins with a user turn that is not the prompt",
        ),
        (
            {"prompt": "Q?", "chosen": turns("s:be", "u:Q?", "a:x"), "rejected": turns("u:Q?", "a:y")},
            "`chosen` and `rejected` repeat the prompt in different ways",
        ),
        ({"prompt": "Q?", "answers": ["x", "y"], "ranks": [1]}, "`ranks` has 1 entries for 2 `answers`"),
        ({"prompt": "Q?", "answers": ["x", "y"], "ranks": "12"}, "`ranks` should be a list of numbers, not text"),
        ({"prompt": "Q?", "answers": ["x", "y"], "scores": [1, float("nan")]}, "`scores` should hold numbers, not nan"),
        ({"prompt": "Q?", "answers": ["x", "y"], "ranks": [1, 2], "scores": [1, 2]}, "both order the answers"),
        ({"prompt": "Q?", "answers": [{"rank": 1}, {"rank": 2}]}, "an answer has none of answer, response, text"),
        ({"prompt": 3, "chosen": "x", "rejected": "y"}, "`prompt` should be text or a list of messages, not a number"),
        ({"prompt": "Q?", "completion": 3, "label": True}, "`completion` should be text or a list of messages"),
        ({"prompt": "Q?", "chosen": turns("a:x"), "rejected": [{"role": "elf", "content": ""}]}, "unknown role 'elf'"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=r".") as caught:
        read(row)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def fate(row: dict[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    result = repair_answers(read(row))
    assert (result.example is None) == (result.dropped is not None)
    return result.dropped, result.rules


@pytest.mark.parametrize(
    ("row", "dropped"),
    [
        ({"prompt": "Q?", "chosen": "x", "rejected": " "}, "empty_answer"),
        ({"prompt": "Q?", "chosen": None, "rejected": "x"}, "empty_answer"),
        ({"prompt": "Q?", "chosen": turns("u:Q?"), "rejected": turns("u:Q?", "a:x")}, "empty_answer"),
        ({"prompt": "Q?", "chosen": "x", "rejected": "x"}, "identical_answers"),
        ({"chosen": turns("u:Q?", "a:x"), "rejected": turns("u:Q?", "a:x")}, "identical_answers"),
        ({"chosen": turns("u:Q?", "a:x"), "rejected": turns("u:P?", "a:y")}, "no_shared_prompt"),
        ({"prompt": "", "chosen": "x", "rejected": "y"}, "no_prompt"),
        ({"prompt": "Q?", "answers": ["x", "y"], "scores": [1, 1]}, "tied"),
        ({"prompt": "Q?", "answers": ["x"], "ranks": [1]}, "few_answers"),
        ({"prompt": "Q?", "answers": [], "ranks": []}, "few_answers"),
        ({"prompt": "Q?", "answers": ["x", "x", "y"], "ranks": [1, 1, 2]}, None),  # they tie: no contradiction
        ({"prompt": "Q?", "answers": ["x", "y", "x"], "ranks": [1, 1, 2]}, "identical_answers"),
        ({"prompt": "Q?", "completion": "", "label": True}, "empty_answer"),
        # An answer that goes on where the prompt's last assistant turn stops: no template writes that.
        ({"prompt": turns("u:Q?", "a:A"), "chosen": "x", "rejected": "y"}, "mixed_weights"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], dropped: str | None):
    assert fate(row)[0] == dropped


def test_answers_are_repaired_as_ends_of_conversations():
    row = {
        "chosen": turns("a:hi", "u:Q?", "u:Q again?", "a:x", "u:bye"),
        "rejected": turns("a:hi", "u:Q?", "u:Q again?", "a:y\ud800"),
    }
    result = repair_answers(read(row))
    assert isinstance(result.example, Preference)
    assert set(result.rules) == {"trailing_user", "leading_assistant", "repeated_role", "broken_unicode"}
    assert said(result.example.prompt) == ["u:Q?\n\nQ again?"]
    assert [said(answer) for answer in result.example.answers] == [["a:x"], ["a:y\ufffd"]]
    assert all(turn.weight is None for turn in (*result.example.prompt, *result.example.answers[0]))


def test_what_counts_in_a_conversation():
    prompt = (Message("user", "Q?"), Message("assistant", "A."), Message("user", "R?"))
    answer = (Message("assistant", "x"), Message("user", "more?"), Message("assistant", "y", 0.5))
    judged = Judged(prompt, answer, True)
    assert [turn.weight for turn in conversation(judged, answer).messages] == [0.0, 0.0, 0.0, 1.0, None, 0.5]
    last = conversation(judged, answer, last_only=True)
    assert [turn.weight for turn in last.messages] == [0.0, 0.0, 0.0, 0.0, None, 0.5]
