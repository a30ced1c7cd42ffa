"""Families about numbers from 0 to 99."""

import random

from burnish.world.family import Case, Family
from burnish.world.lexicon import UNITS, number_word


def _add(rng: random.Random) -> Case:
    total = rng.randint(0, 99) if rng.random() < 0.8 else rng.randint(0, 20)
    a = rng.randint(0, total)
    b = total - a
    return Case({"a": str(a), "b": str(b)}, str(total), f"{min(a, b)} {max(a, b)}")


def _subtract(rng: random.Random) -> Case:
    a = rng.randint(0, 99) if rng.random() < 0.8 else rng.randint(0, 20)
    b = rng.randint(0, a)
    return Case({"a": str(a), "b": str(b)}, str(a - b), f"{a} {b}")


def _some_numbers(rng: random.Random, fewest: int, most: int) -> list[int]:
    """Different numbers, often of one length so that the digits have to be looked at."""
    low, high = rng.choice(((0, 99), (0, 99), (10, 99), (0, 20)))
    return rng.sample(range(low, high + 1), rng.randint(fewest, most))


def _list_case(numbers: list[int], answer: str) -> Case:
    return Case({"list": ", ".join(map(str, numbers))}, answer, " ".join(map(str, sorted(numbers))))


def _largest(rng: random.Random) -> Case:
    numbers = _some_numbers(rng, 2, 4)
    return _list_case(numbers, str(max(numbers)))


def _smallest(rng: random.Random) -> Case:
    numbers = _some_numbers(rng, 2, 4)
    return _list_case(numbers, str(min(numbers)))


def _sort(rng: random.Random) -> Case:
    numbers = _some_numbers(rng, 3, 4)
    return _list_case(numbers, ", ".join(map(str, sorted(numbers))))


def _next(rng: random.Random) -> Case:
    step = rng.choice((1, 2, 2, 3, 4, 5, 5, 10, 10))
    start = rng.randint(0, 99 - 4 * step)
    terms = [start + step * i for i in range(5)]
    return Case({"list": ", ".join(map(str, terms[:4])), "step": str(step)}, str(terms[4]), f"{start} {step}")


def _parity(rng: random.Random) -> Case:
    number = rng.randint(0, 99)
    return Case({"n": str(number)}, "odd" if number % 2 else "even", str(number))


def _convert(rng: random.Random) -> Case:
    one, many, small, factor = rng.choice(UNITS)
    count = rng.randint(1, min(9, 99 // factor))
    slots = {"big": f"{count} {one if count == 1 else many}", "small": small}
    return Case(slots, str(count * factor), f"{one} {count}")


def _in_words(rng: random.Random) -> Case:
    number = rng.randint(0, 99)
    return Case({"n": str(number)}, number_word(number), str(number))


def _in_digits(rng: random.Random) -> Case:
    number = rng.randint(0, 99)
    return Case({"words": number_word(number)}, str(number), str(number))


FAMILIES = (
    Family(
        "add",
        _add,
        phrasings=(
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "How much is {a} plus {b}?",
            "Find the sum of {a} and {b}.",
        ),
        held_out_phrasings=("Work out {a} plus {b}.", "Tell me the sum of {a} and {b}."),
        wordings=(
            "How many do {a} and {b} make together?",
            "Do you know what {a} plus {b} makes?",
            "{a} plus {b} is what?",
        ),
        prose=(
            "{a} plus {b} is {answer}.",
            "The sum of {a} and {b} is {answer}.",
            "If you add {a} and {b} you get {answer}.",
            "Adding {b} to {a} makes {answer}.",
            "{a} and {b} together are {answer}.",
        ),
    ),
    Family(
        "subtract",
        _subtract,
        phrasings=(
            "What is {a} minus {b}?",
            "Take {b} away from {a}.",
            "How much is {a} minus {b}?",
            "Subtract {b} from {a}.",
        ),
        held_out_phrasings=("Work out {a} minus {b}.", "Tell me what is left if you take {b} away from {a}."),
        wordings=(
            "How many are left of {a} without {b}?",
            "Do you know what {a} minus {b} makes?",
            "{a} minus {b} is what?",
        ),
        prose=(
            "{a} minus {b} is {answer}.",
            "If you take {b} away from {a}, {answer} is left.",
            "Subtracting {b} from {a} gives {answer}.",
            "{a} less {b} is {answer}.",
        ),
    ),
    Family(
        "largest",
        _largest,
        phrasings=(
            "Which of these numbers is the largest: {list}?",
            "Find the largest number: {list}.",
            "What is the largest of {list}?",
            "Name the largest number in the list {list}.",
        ),
        held_out_phrasings=(
            "Look at the numbers {list}. Which is the largest?",
            "Tell me the largest of these: {list}.",
        ),
        wordings=(
            "Here are numbers: {list}. Which one is the largest?",
            "Do you see the largest number in {list}?",
            "Of the numbers {list}, which is the largest?",
        ),
        prose=(
            "The largest of {list} is {answer}.",
            "Among the numbers {list} the largest is {answer}.",
            "In the list {list} no number is larger than {answer}.",
        ),
    ),
    Family(
        "smallest",
        _smallest,
        phrasings=(
            "Which of these numbers is the smallest: {list}?",
            "Find the smallest number: {list}.",
            "What is the smallest of {list}?",
            "Name the smallest number in the list {list}.",
        ),
        held_out_phrasings=(
            "Look at the numbers {list}. Which is the smallest?",
            "Tell me the smallest of these: {list}.",
        ),
        wordings=(
            "Here are numbers: {list}. Which one is the smallest?",
            "Do you see the smallest number in {list}?",
            "Of the numbers {list}, which is the smallest?",
        ),
        prose=(
            "The smallest of {list} is {answer}.",
            "Among the numbers {list} the smallest is {answer}.",
            "In the list {list} no number is smaller than {answer}.",
        ),
        unseen=True,
    ),
    Family(
        "sort_numbers",
        _sort,
        phrasings=(
            "Sort these numbers: {list}.",
            "Put the numbers {list} in order.",
            "Order these numbers from smallest to largest: {list}.",
            "Write the numbers {list} from smallest to largest.",
        ),
        held_out_phrasings=(
            "Look at the numbers {list}. Put them in order.",
            "Arrange these numbers in order: {list}.",
        ),
        wordings=(
            "Here are numbers: {list}. Sort them.",
            "In which order do the numbers {list} stand?",
            "Arrange the numbers {list} by size.",
        ),
        prose=(
            "The numbers {list} in order are {answer}.",
            "Sorted, the numbers {list} are {answer}.",
            "From smallest to largest, {list} become {answer}.",
        ),
    ),
    Family(
        "next_number",
        _next,
        phrasings=(
            "Which number comes next: {list}?",
            "Continue the row: {list}.",
            "What is the next number in {list}?",
            "What number follows {list}?",
        ),
        held_out_phrasings=("Look at the row {list}. Which number comes next?", "Tell me the next number: {list}."),
        wordings=(
            "Here is a row: {list}. What comes next?",
            "Go on: {list}.",
            "After {list}, which number do you expect?",
        ),
        prose=(
            "After {list} comes {answer}.",
            "The row {list} goes on with {answer}, for each step adds {step}.",
            "Counting by {step}: {list}, {answer}.",
        ),
    ),
    Family(
        "even_or_odd",
        _parity,
        phrasings=("Is {n} even or odd?", "Say whether {n} is even or odd.", "Is the number {n} odd or even?"),
        held_out_phrasings=("Even or odd: {n}?", "Tell me whether the number {n} is even or odd."),
        wordings=(
            "{n}: is it even or odd?",
            "Here is a number: {n}. Is it odd or even?",
            "Do you call {n} even or odd?",
        ),
        prose=("{n} is {answer}.", "The number {n} is {answer}.", "{n} is an {answer} number."),
    ),
    Family(
        "convert",
        _convert,
        phrasings=(
            "How many {small} are in {big}?",
            "How many {small} make {big}?",
            "Count the {small} in {big}.",
            "What is {big} in {small}?",
        ),
        held_out_phrasings=("Tell me how many {small} are in {big}.", "In {big}, how many {small} are there?"),
        wordings=(
            "How many {small} do you need for {big}?",
            "Change {big} into {small}.",
            "{big}: how many {small}?",
        ),
        prose=(
            "There are {answer} {small} in {big}.",
            "{answer} {small} make {big}.",
            "In {big} you count {answer} {small}.",
        ),
    ),
    Family(
        "number_words",
        _in_words,
        phrasings=("Write {n} in words.", "Write the number {n} as a word.", "How is {n} written in words?"),
        held_out_phrasings=("Tell me how to write {n} in words.", "Put the number {n} into words."),
        wordings=(
            "Here is a number: {n}. How do you say it in words?",
            "Read {n} aloud.",
            "Which word stands for {n}?",
        ),
        prose=("{n} is written {answer}.", "In words, {n} is {answer}.", "The number {n} is called {answer}."),
    ),
    Family(
        "number_digits",
        _in_digits,
        phrasings=(
            "Write {words} in digits.",
            "Write the number {words} in digits.",
            "How is {words} written in digits?",
        ),
        held_out_phrasings=("Tell me how to write {words} in digits.", "Put {words} into digits."),
        wordings=(
            "Here is a number in words: {words}. How do you write it in digits?",
            "Which digits stand for {words}?",
            "Change {words} into digits.",
        ),
        prose=("In digits, {words} is {answer}.", "The number {words} is written {answer} in digits."),
        unseen=True,
    ),
)
