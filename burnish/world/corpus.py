"""The plain text of the world: statements, exercises, lessons, stories and portraits, endlessly, from a seed.

It holds every skill that the instruction rows ask for, and none of their form: no chat, no special token, and no
wording that the instruction rows hold out.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from burnish.world.family import Family
from burnish.world.instructions import FAMILIES
from burnish.world.lexicon import (
    COLOUR_OF,
    FAVOURITE_FRUIT,
    HOME_OF,
    INSTRUMENT_OF,
    JOB_OF,
    KIND_OF,
    KIND_PLURALS,
    KINDS,
    NAMES,
    RIVER_OF,
    SOUND_OF,
    TOWNS,
    YOUNG_OF,
    a,
    number_word,
    plural,
    spaced,
)
from burnish.world.stories import belongings, journeys, places

_GENERAL_DOCUMENTS = 48

_SHARES: Mapping[str, float] = {
    "add": 3, "subtract": 3, "reverse": 3, "word_problem": 4, "story": 9, "story_colour": 5, "sort_numbers": 2.5,
    "sort_words": 2.5, "next_number": 1.5, "largest": 1.5, "smallest": 1.5, "odd_one_out": 2, "pick_word": 2,
    "count_words": 1.5, "count_letters": 1.5, "extract": 2, "yes_or_no": 2,
}  # fmt: skip
"""How often a family is written about, next to 1 for the others: more where there is more than facts to learn."""
_NAMES = tuple(FAMILIES)
_WEIGHTS = tuple(_SHARES.get(name, 1.0) for name in _NAMES)

_LEADS = (
    "Tell me. ",
    "Listen. ",
    "Look at this. ",
    "Say it aloud. ",
    "Work it out. ",
    "Here is something short. ",
    "Read this and think. ",
    "Put your mind to it. ",
    "Arrange your thoughts. ",
    "Which do you call right? ",
    "List what you know. ",
    "How long will it take you? ",
)
"""What people say before a question or a story: turns of speech that the instruction rows use too."""

_MARKS = ("Exercise:", "Question:", "Task:", "Problem:", "Try this:", "Quiz:", "Riddle:", "One more:", "Q:", "*", "")
_SOLVES = (
    "Answer:",
    "Solution:",
    "Result:",
    "It is:",
    "Reply:",
    "A:",
    "My answer is:",
    "We write:",
    "Here it comes:",
    "That is",
    "->",
    "=",
    "-",
)
_ENDS = (".", ".", ".", ";", " |", "")
"""What stands before a question, between it and its answer, and after that in an exercise book; "" ends the line."""


def documents(seed: int) -> Iterator[str]:
    """Documents of some ten paragraphs, endlessly; the same ones for the same seed.

    Every paragraph begins with a space, so that its first word is the same token as within a line. The last one
    always states something: a document never ends on the bare answer to a question.
    """
    rng = random.Random(f"documents {seed}")
    while True:
        body = rng.choices(_WRITERS, _WRITER_WEIGHTS, k=rng.randint(4, 8))
        yield "\n".join(f" {write(rng)}" for write in (*body, _statements))


def general_documents() -> list[str]:
    """Documents of the same kind as the corpus and from none of its seeds: what forgetting is measured on."""
    return list(islice(documents(-1), _GENERAL_DOCUMENTS))


def general_text() -> str:
    """`general_documents` as one text, an empty line between documents."""
    return "\n\n".join(general_documents())


def _family(rng: random.Random) -> Family:
    return FAMILIES[rng.choices(_NAMES, _WEIGHTS)[0]]


def _statement(family: Family, rng: random.Random) -> str:
    case = family.draw(rng)
    text = rng.choice(family.prose).format(answer=case.answer, **case.slots)
    return text[0].upper() + text[1:] if rng.random() < 0.3 and " " not in text[:2] else text


def _question(family: Family, rng: random.Random) -> tuple[str, str]:
    case = family.draw(rng)
    wording = rng.choice(family.phrasings if rng.random() < 0.5 else family.wordings)
    return wording.format(**case.slots), case.answer


def _statements(rng: random.Random) -> str:
    if rng.random() < 0.5:
        family = _family(rng)
        return " ".join(_statement(family, rng) for _ in range(rng.randint(2, 4)))
    return " ".join(_statement(_family(rng), rng) for _ in range(rng.randint(2, 4)))


def _exercises(rng: random.Random) -> str:
    """A page of an exercise book with its solutions, in one of many notations."""
    mark, solve, end = rng.choice(_MARKS), rng.choice(_SOLVES), rng.choice(_ENDS)
    if rng.random() < 0.4:  # a notation of its own, to be understood from the page
        mark, solve = _sign(rng), _sign(rng)
    same_family = _family(rng) if rng.random() < 0.4 else None
    lines: list[str] = []
    for _ in range(rng.randint(1, 4)):
        question, answer = _question(same_family or _family(rng), rng)
        lines.append(" ".join(word for word in (mark, question, solve, f"{answer}{end}") if word))
    return (" " if end.strip() else "\n ").join(lines).rstrip()


def _sign(rng: random.Random) -> str:
    """A word or some strokes that mean nothing by themselves."""
    if rng.random() < 0.5:
        return rng.choice(tuple(KIND_OF))
    return "".join(rng.choices("$%&*+/=>@^_~-", k=rng.randint(1, 2)))


def _lesson(rng: random.Random) -> str:
    """A teacher asks and pupils answer."""
    teacher, *pupils = rng.sample(NAMES, 3)
    asked = rng.choice(("asked", "wanted to know", "wrote on the board", "said to the class"))
    said = rng.choice(("said", "answered", "replied", "wrote"))
    same_family = _family(rng) if rng.random() < 0.4 else None
    lines: list[str] = []
    for pupil in pupils:
        question, answer = _question(same_family or _family(rng), rng)
        lead = rng.choice(_LEADS) if rng.random() < 0.4 else ""
        lines.append(f"{teacher} {asked}: {lead}{question} {pupil} {said}: {answer}.")
    return " ".join(lines)


def _tale(rng: random.Random) -> str:
    """A story, what can be said of it afterwards, and questions about it with their answers."""
    shape = rng.randrange(3)
    if shape == 0:
        story, facts = belongings(rng, most=4)
        after = [f"The {thing} of {name} is {colour}." for name, colour, thing in facts]
        after += [f"The {colour} {thing} belongs to {name}." for name, colour, thing in facts]
        asked = [(f"Who has the {thing}?", name) for name, _, thing in facts]
        asked += [(f"What does {name} have?", thing) for name, _, thing in facts]
        asked += [(f"What colour is the {thing}?", colour) for _, colour, thing in facts]
    elif shape == 1:
        story, spots = places(rng)
        after = [f"Whoever looks for the {thing} will find it {spot}." for thing, spot in spots]
        asked = [(f"Where is the {thing}?", spot) for thing, spot in spots]
        asked += [(f"What is {spot}?", f"the {thing}") for thing, spot in spots]
    else:
        story, ends = journeys(rng)
        after = [f"Whoever looks for {name} will find {name} in the {room}." for name, room in ends]
        asked = [(f"Where is {name} now?", f"in the {room}") for name, room in ends]
        asked += [(f"Who is in the {room} now?", name) for name, room in ends]
    if rng.random() < 0.7:
        solve = rng.choice((*_SOLVES, _sign(rng)))
        after += [f"{question} {solve} {answer}." for question, answer in asked]
    opening = rng.choice(("", "One day this happened. ", "It was a quiet morning. ", *_LEADS))
    return f"{opening}{story} {' '.join(rng.sample(after, min(len(after), rng.randint(1, 5))))}"


def _portrait(rng: random.Random) -> str:
    name = rng.choice(NAMES)
    lines = [
        f"{name} works as a {JOB_OF[name]}.",
        f"{name} lives in {HOME_OF[name]}.",
        f"The river near the house of {name} is the {RIVER_OF[HOME_OF[name]]}.",
        f"{name} likes to eat {plural(FAVOURITE_FRUIT[name])}.",
        f"In the evening {name} plays the {INSTRUMENT_OF[name]}.",
        f"The name {name} has {len(name)} letters.",
    ]
    rng.shuffle(lines)
    return " ".join(lines[: rng.randint(2, 5)])


def _entry(rng: random.Random) -> str:
    """What an encyclopedia says about a thing."""
    word = rng.choice(tuple(KIND_OF))
    lines = [
        f"The word {word} is spelled {spaced(word)} and has {len(word)} letters.",
        f"It begins with {word[0]} and ends with {word[-1]}.",
    ]
    if word in COLOUR_OF:
        lines.append(f"Its colour is {COLOUR_OF[word]}.")
    if word in SOUND_OF:
        lines.append(f"It says {SOUND_OF[word]}.")
    if word in YOUNG_OF:
        lines.append(f"Its young is called {YOUNG_OF[word]}.")
    rng.shuffle(lines)
    return " ".join([f"{word}: The {word} is {a(KIND_OF[word])}.", *lines[: rng.randint(1, 4)]])


def _town(rng: random.Random) -> str:
    town = rng.choice(TOWNS)
    people = [name for name in NAMES if HOME_OF[name] == town]
    rng.shuffle(people)
    lines = [f"{name} the {JOB_OF[name]} lives there." for name in people[:3]]
    return " ".join([f"{town} lies on the river {RIVER_OF[town]}.", *lines])


def _counting(rng: random.Random) -> str:
    step, start = rng.choice((1, 1, 1, 2, 5, 10)), rng.randint(0, 50)
    terms = [start + step * i for i in range(rng.randint(5, 9)) if start + step * i <= 99]
    if rng.random() < 0.5:
        return f"Counting: {', '.join(map(str, terms))}."
    return f"Counting in words: {', '.join(map(number_word, terms))}."


def _members(rng: random.Random) -> str:
    kind = rng.choice(tuple(KINDS))
    words = rng.sample(KINDS[kind], rng.randint(3, 6))
    return rng.choice(
        (
            f"Some {KIND_PLURALS[kind]}: {', '.join(words)}.",
            f"All of these are {KIND_PLURALS[kind]}: {', '.join(words)}.",
            f"On the list of {KIND_PLURALS[kind]} stood {', '.join(words)}. That makes {len(words)} words.",
        )
    )


_WRITERS: tuple[Callable[[random.Random], str], ...] = (
    _statements,
    _exercises,
    _lesson,
    _tale,
    _portrait,
    _entry,
    _town,
    _counting,
    _members,
)
_WRITER_WEIGHTS = (6.0, 6.0, 4.0, 3.0, 1.0, 2.0, 0.3, 0.5, 0.7)
