"""Pairs of answers, and what answers are worth: right beats wrong, concise beats rambling."""

import functools
import re

import pytest

from burnish import world
from burnish.world import FAMILIES, SEEN, UNSEEN, check, worth
from burnish.world.family import normalise

PAIRS = ("preferences", "preferences_held_out")
HELD_OUT = ("held_out_seen", "held_out_unseen")


def asked(row: dict) -> str:
    return row["prompt"] if "prompt" in row else row["messages"][0]["content"]


@functools.cache
def rows(split: str) -> list[dict]:
    return world.rows(split)


def is_wrong(row: dict) -> bool:
    """Whether the worse answer does not say the better one anywhere."""
    return f" {row['chosen']}." not in f" {row['rejected']}."


def test_enough_rows_of_the_families_that_training_has():
    for split in ("preferences", "prompts"):
        assert 2000 <= len(rows(split)) <= 2500
        assert {row["task"] for row in rows(split)} == set(SEEN)
    assert {row["task"] for row in rows("preferences_held_out")} == {*SEEN, *UNSEEN}


@pytest.mark.parametrize("split", ["preferences", "prompts"])
def test_no_question_of_the_held_out_splits(split: str):
    held = {normalise(asked(row)) for name in HELD_OUT for row in rows(name)}
    own = [asked(row) for row in rows(split)]
    assert not held & {normalise(question) for question in own}
    assert len(own) == len(set(own))


def test_no_case_of_the_held_out_splits_in_another_wording():
    for split in ("preferences", "prompts"):
        own = {re.search(r"(\w+)\.?\??$", asked(row))[1] for row in rows(split) if row["task"] == "spell"}
        held = {answer.replace(" ", "") for answer in _answers("held_out_seen", "spell")}
        assert own
        assert held
        assert not own & held


def _answers(split: str, task: str) -> list[str]:
    return [row["messages"][1]["content"] for row in rows(split) if row["task"] == task]


def test_held_out_pairs_are_about_the_held_out_questions():
    held = [asked(row) for name in HELD_OUT for row in rows(name)]
    assert [row["prompt"] for row in rows("preferences_held_out")] == held


def test_questions_and_answers_of_pairs_are_right():
    """Recomputed from the question's own numbers."""
    counted = 0
    for row in (row for split in PAIRS for row in rows(split)):
        numbers = [int(word) for word in re.findall(r"\d+", row["prompt"])]
        match row["task"]:
            case "add":
                assert row["chosen"] == str(sum(numbers))
            case "largest":
                assert row["chosen"] == str(max(numbers))
            case "sort_numbers":
                assert row["chosen"] == ", ".join(map(str, sorted(numbers)))
            case _:
                continue
        counted += 1
    assert counted > 250


@pytest.mark.parametrize("task", FAMILIES)
def test_the_better_answer_is_worth_more(task: str):
    found = [row for split in PAIRS for row in rows(split) if row["task"] == task]
    assert found
    for row in found:
        better, worse = (worth(task, row["chosen"], row[side]) for side in ("chosen", "rejected"))
        assert better == 1.0
        assert not check(task, row["chosen"], row["rejected"])
        if is_wrong(row):
            assert -1.0 <= worse <= -0.6, row
        else:
            assert 0.2 < worse < 0.6, row
            assert len(row["rejected"]) > len(row["chosen"])


def test_both_kinds_of_worse_answer_are_common():
    share = sum(map(is_wrong, rows("preferences"))) / len(rows("preferences"))
    assert 0.5 < share < 0.7


def test_wrong_answers_are_of_the_right_kind():
    """A slip keeps the form of the answer: a number stays a number, a list a list, a word of the question one of it."""
    wrong = [row for row in rows("preferences") if is_wrong(row)]
    for row in wrong:
        if row["chosen"].isdecimal() and row["task"] != "extract":  # which may take another word of the sentence
            assert row["rejected"].isdecimal(), row
        if ", " in row["chosen"]:
            assert ", " in row["rejected"], row
        if row["task"] in ("pick_word", "odd_one_out"):
            assert row["rejected"] in row["prompt"], row


@pytest.mark.parametrize(
    ("task", "reference", "answers"),
    [
        (
            "add",
            "12",
            [
                "12",
                "The answer is 12.",
                "You asked: What is 5 plus 7? The answer is 12. I hope that helps.",
                "13",
                "It is 13.",
            ],
        ),
        ("even_or_odd", "odd", ["Odd.", "It must be odd.", "odd or even"]),
        ("spell", "c a t", ["c a t", "I say c a t.", "c t a", "c t a c t a"]),
        ("name_two", "owl, robin", ["crow, duck", "I say crow, duck.", "crow, trout"]),
        ("job", "baker", ["baker", "Well, let me see. I say baker.", "smith", ""]),
        # Saying both is no way to be right: what counts is what is said last.
        ("review", "good", ["good", "Good or bad? I say good.", "good bad", "I say good. I say bad."]),
        # Courtesies alone say nothing.
        (
            "kind",
            "bird",
            ["bird", "bird. I hope that helps.", "I hope that helps.", "That is a good question. I am glad to help."],
        ),
    ],
)
def test_answers_from_best_to_worst(task: str, reference: str, answers: list[str]):
    values = [worth(task, reference, answer) for answer in answers]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    assert all(-1.0 <= value <= 1.0 for value in values)


def test_a_task_that_is_not_of_this_world_is_worth_its_exact_match():
    assert worth("geography", "Paris", " paris. ") == 1.0
    assert worth("geography", "Paris", "Rome") == pytest.approx(-0.6)
