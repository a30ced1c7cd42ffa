"""The rows and their graders: deterministic, disjoint, and strict about right and wrong."""

import itertools
import re
import subprocess
import sys
import zlib

import pytest

from burnish.world import FAMILIES, SEEN, SPLITS, UNSEEN, check, rows
from burnish.world.family import normalise
from burnish.world.lexicon import KINDS

HELD_OUT = ("held_out_seen", "held_out_unseen")


def prompt(row: dict) -> str:
    return row["messages"][0]["content"]


def answer(row: dict) -> str:
    return row["messages"][1]["content"]


def pattern(phrasing: str) -> re.Pattern[str]:
    """A phrasing as a regular expression, whatever its slots hold."""
    parts = [re.escape(part) for part in re.split(r"\{\w+\}", phrasing)]
    return re.compile(".+".join(parts), re.DOTALL)


@pytest.mark.parametrize("split", SPLITS)
def test_same_rows_each_time(split):
    assert rows(split) == rows(split)


def test_same_rows_in_another_process():
    """Nothing depends on the order of a set or on the hash seed of the process."""
    code = "import zlib; from burnish.world import rows; print(zlib.crc32(repr([rows(s) for s in {}]).encode()))"
    shown = subprocess.run(
        [sys.executable, "-c", code.format(SPLITS)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert int(shown.stdout) == zlib.crc32(repr([rows(split) for split in SPLITS]).encode())


def test_unknown_split_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no split 'test'; write one of train, held_out_seen, held_out_unseen, general"
    ):
        rows("test")


def test_enough_families_and_rows():
    assert len(SEEN) >= 14
    assert len(UNSEEN) >= 3
    train = rows("train")
    assert 3000 <= len(train) <= 5000
    assert {row["task"] for row in train} == set(SEEN)
    assert {row["task"] for row in rows("held_out_seen")} == set(SEEN)
    assert {row["task"] for row in rows("held_out_unseen")} == set(UNSEEN)


def test_rows_are_one_question_and_one_answer():
    for split in ("train", *HELD_OUT):
        for row in rows(split):
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            assert prompt(row).strip() == prompt(row) != ""
            assert answer(row).strip() == answer(row) != ""
            assert "{" not in prompt(row) + answer(row)


@pytest.mark.parametrize("split", ["train", *HELD_OUT])
def test_no_question_twice(split):
    prompts = [prompt(row) for row in rows(split)]
    assert len(prompts) == len(set(prompts))


def test_no_held_out_question_in_train():
    trained = {normalise(prompt(row)) for row in rows("train")}
    for split in HELD_OUT:
        assert not trained & {normalise(prompt(row)) for row in rows(split)}


def test_held_out_cases_are_new_in_every_wording():
    """What a wording is about (its word, its numbers, its story) is new too, not just the sentence."""
    for task, word in (
        ("spell", r"(\w+)[.?]$"),
        ("opposite", r"(\w+)[.?]$"),
        ("job", r"(?:of|does|As what does) (\w+)"),
    ):
        trained = {match[1] for row in rows("train") if row["task"] == task and (match := re.search(word, prompt(row)))}
        kept = [
            match[1] for row in rows("held_out_seen") if row["task"] == task and (match := re.search(word, prompt(row)))
        ]
        assert trained
        assert kept
        # `seen` wordings end in the word itself, so the sets hold words, and none is shared.
        assert not trained & {found for found in kept if found not in ("of", "have", "as", "it", "work")}


@pytest.mark.parametrize("task", FAMILIES)
def test_held_out_phrasings_are_not_trained_on(task):
    family = FAMILIES[task]
    assert len(family.phrasings) >= 3
    assert len(family.held_out_phrasings) >= 2
    assert not set(family.held_out_phrasings) & {*family.phrasings, *family.wordings}
    asked = [prompt(row) for row in rows("train") if row["task"] == task]
    for held_out, text in itertools.product(family.held_out_phrasings, asked):
        assert not pattern(held_out).fullmatch(text), (held_out, text)


def test_half_of_the_held_out_rows_use_held_out_phrasings():
    assert {row["phrasing"] for row in rows("train")} == {"seen"}
    for split in HELD_OUT:
        for row in rows(split):
            family = FAMILIES[row["task"]]
            wordings = family.held_out_phrasings if row["phrasing"] == "held_out" else family.phrasings
            assert any(pattern(wording).fullmatch(prompt(row)) for wording in wordings)
        share = sum(row["phrasing"] == "held_out" for row in rows(split)) / len(rows(split))
        assert share == pytest.approx(0.5, abs=0.02)


def test_a_prefix_of_the_held_out_rows_is_a_fair_sample():
    for split, families in zip(HELD_OUT, (SEEN, UNSEEN), strict=True):
        assert {row["task"] for row in rows(split)[: len(families)]} == set(families)


@pytest.mark.parametrize("task", FAMILIES)
def test_checker_takes_the_reference_and_no_other_answer(task):
    found = [row for split in ("train", *HELD_OUT) for row in rows(split) if row["task"] == task][:60]
    assert found
    for row in found:
        right = answer(row)
        assert check(task, right, right)
        assert check(task, right, f"  {right.upper()}.\n")
        for wrong in ("", "zebra", right + " zebra", "zebra " + right, right + right, right[:-1]):
            assert not check(task, right, wrong), (right, wrong)


def test_name_two_takes_any_two_of_the_kind():
    reference = ", ".join(KINDS["bird"][:2])
    assert check("name_two", reference, "Owl, robin.")
    for wrong in ("owl", "owl, owl", "owl, robin, crow", "owl, trout", "owl robin"):
        assert not check("name_two", reference, wrong)


def test_answers_to_sums_are_right():
    """Recomputed from the prompt's own numbers."""
    counted = 0
    for row in (row for split in ("train", *HELD_OUT) for row in rows(split)):
        numbers = [int(word) for word in re.findall(r"\d+", prompt(row))]
        match row["task"]:
            case "add":
                expected = str(sum(numbers))
            case "subtract":
                expected = str(max(numbers) - min(numbers))
            case "largest":
                expected = str(max(numbers))
            case "smallest":
                expected = str(min(numbers))
            case "sort_numbers":
                expected = ", ".join(map(str, sorted(numbers)))
            case "even_or_odd":
                expected = ("even", "odd")[numbers[0] % 2]
            case "next_number":
                expected = str(2 * numbers[-1] - numbers[-2])
            case _:
                continue
        assert answer(row) == expected, row
        counted += 1
    assert counted > 800


def test_a_task_that_is_not_of_this_world_is_graded_by_exact_match():
    assert check("geography", "Paris", " paris. ")
    assert not check("geography", "Paris", "Rome")
