"""Families about a short text: questions on a story, sums in a story, and finding something in a sentence."""

import random

from burnish.world.family import Case, Family
from burnish.world.lexicon import COLOURS, COUNTED, DAYS, NAMES, PLAIN_NOUNS, ROOMS, SPOTS, TOWNS, a, plural


def belongings(rng: random.Random, most: int = 3) -> tuple[str, list[tuple[str, str, str]]]:
    """A story in which some people each have a thing of some colour, and the (name, colour, thing) of each."""
    count = rng.randint(2, most)
    names, things = rng.sample(NAMES, count), rng.sample(PLAIN_NOUNS, count)
    facts: list[tuple[str, str, str]] = list(zip(names, rng.sample(COLOURS, count), things, strict=True))
    verb = rng.choice(("has", "owns", "holds", "found"))
    story = " ".join(f"{name} {verb} {a(f'{colour} {thing}')}." for name, colour, thing in facts)
    return story, facts


def places(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A story in which some things lie in some spots, and the (thing, spot) of each."""
    count = rng.randint(2, 3)
    facts: list[tuple[str, str]] = list(zip(rng.sample(PLAIN_NOUNS, count), rng.sample(SPOTS, count), strict=True))
    verb = rng.choice(("is", "lies"))
    return " ".join(f"The {thing} {verb} {spot}." for thing, spot in facts), facts


def journeys(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A story in which people go to places, one of them to two; the (name, where they are at the end) of each."""
    first, second = rng.sample(NAMES, 2)
    one, two, three = rng.sample(ROOMS, 3)
    lines = [f"{first} went to the {one}.", f"{second} went to the {two}."]
    rng.shuffle(lines)
    if rng.random() < 0.5:
        return " ".join([*lines, f"Then {first} went to the {three}."]), [(first, three), (second, two)]
    return " ".join(lines), [(first, one), (second, two)]


def _case(story: str, question: str, statement: str, answer: str) -> Case:
    return Case({"story": story, "question": question, "statement": statement}, answer, f"{story} {question}")


def _story(rng: random.Random) -> Case:
    shape = rng.choice(("owner", "thing", "place", "gift", "journey"))
    if shape in ("owner", "thing"):
        story, facts = belongings(rng)
        name, _, thing = rng.choice(facts)
        if shape == "owner":
            return _case(story, f"Who has the {thing}?", f"{name} has the {thing}", name)
        return _case(story, f"What does {name} have?", f"{name} has the {thing}", thing)
    if shape == "place":
        story, spots = places(rng)
        thing, spot = rng.choice(spots)
        return _case(story, f"Where is the {thing}?", f"the {thing} is {spot}", spot)
    if shape == "journey":
        story, ends = journeys(rng)
        name, room = rng.choice(ends)
        return _case(story, f"Where is {name} now?", f"{name} is now in the {room}", f"in the {room}")
    giver, taker = rng.sample(NAMES, 2)
    thing = rng.choice(PLAIN_NOUNS)
    story = f"{giver} had {a(f'{rng.choice(COLOURS)} {thing}')}. {giver} gave it to {taker}."
    return _case(story, f"Who has the {thing}?", f"{taker} has the {thing}", taker)


def _story_colour(rng: random.Random) -> Case:
    story, facts = belongings(rng)
    _, colour, thing = rng.choice(facts)
    return _case(story, f"What colour is the {thing}?", f"the {thing} is {colour}", colour)


def _word_problem(rng: random.Random) -> Case:
    name, other = rng.sample(NAMES, 2)
    things = plural(rng.choice(COUNTED))
    total = rng.randint(4, 20)
    part = rng.randint(2, total - 2)
    if rng.random() < 0.5:
        story = f"{name} had {total} {things} and gave {part} to {other}."
        question = f"How many {things} does {name} have now?"
        return _case(story, question, f"{name} has {total - part} {things} now", str(total - part))
    story = f"{name} had {part} {things} and {other} brought {total - part} more."
    return _case(story, f"How many {things} are there now?", f"there are {total} {things} now", str(total))


def _sentence(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A sentence about a purchase, and what it mentions by name."""
    parts = {
        "day": rng.choice(DAYS),
        "name": rng.choice(NAMES),
        "number": str(rng.randint(2, 99)),
        "colour": rng.choice(COLOURS),
        "town": rng.choice(TOWNS),
    }
    things = plural(rng.choice(COUNTED))
    verb = rng.choice(("bought", "sold", "saw", "counted"))
    shape = rng.choice(
        (
            "On {day} {name} {verb} {number} {colour} {things} in {town}.",
            "In {town} {name} {verb} {number} {colour} {things} on {day}.",
            "{name} {verb} {number} {colour} {things} in {town} on {day}.",
        )
    )
    return shape.format(verb=verb, things=things, **parts), parts


def _extract_one(rng: random.Random, wanted: tuple[str, ...]) -> Case:
    sentence, parts = _sentence(rng)
    part = rng.choice(wanted)
    return Case({"sentence": sentence, "part": part}, parts[part], f"{sentence} {part}")


def _extract(rng: random.Random) -> Case:
    return _extract_one(rng, ("day", "name", "number", "colour"))


def _extract_town(rng: random.Random) -> Case:
    return _extract_one(rng, ("town",))


_EXTRACT_PHRASINGS = (
    "Find the {part} in this sentence: {sentence}",
    "Which {part} does the sentence name? {sentence}",
    "{sentence} What is the {part} in this sentence?",
    "Copy the {part} from the sentence: {sentence}",
)
_EXTRACT_HELD_OUT = (
    "Read the sentence and write the {part}: {sentence}",
    "{sentence} Tell me the {part} in this sentence.",
)
_EXTRACT_WORDINGS = (
    "Here is a sentence: {sentence} What {part} do you see in it?",
    "{sentence} Say the {part} that you read there.",
    "Do you see the {part}? {sentence}",
)
_EXTRACT_PROSE = (
    "{sentence} The {part} in this sentence is {answer}.",
    'The sentence "{sentence}" names the {part} {answer}.',
    'The {part} in "{sentence}" is {answer}.',
)
_STORY_PROSE = ("{story} So {statement}.", "{story} In the end {statement}.", "{story} Now we know that {statement}.")

FAMILIES = (
    Family(
        "story",
        _story,
        phrasings=(
            "{story} {question}",
            "Read the story. {story} {question}",
            "{question} {story}",
            "Answer the question. {story} {question}",
        ),
        held_out_phrasings=("Here is a short story: {story} {question}", "{story} Tell me: {question}"),
        wordings=(
            "Here is a story. {story} {question}",
            "{story} Now the question: {question}",
            "Listen: {story} {question}",
        ),
        prose=_STORY_PROSE,
    ),
    Family(
        "story_colour",
        _story_colour,
        phrasings=(
            "{story} {question}",
            "Read the story. {story} {question}",
            "Answer the question. {story} {question}",
        ),
        held_out_phrasings=("Here is a short story: {story} {question}", "{story} Tell me: {question}"),
        wordings=(
            "Here is a story. {story} {question}",
            "{story} Now the question: {question}",
            "{question} {story}",
        ),
        prose=_STORY_PROSE,
        unseen=True,
    ),
    Family(
        "word_problem",
        _word_problem,
        phrasings=("{story} {question}", "Read the story. {story} {question}", "Work it out. {story} {question}"),
        held_out_phrasings=("Here is a short story: {story} {question}", "{story} Tell me: {question}"),
        wordings=(
            "Here is a story. {story} {question}",
            "{story} Now the question: {question}",
            "Listen: {story} {question}",
        ),
        prose=_STORY_PROSE,
    ),
    Family(
        "extract",
        _extract,
        phrasings=_EXTRACT_PHRASINGS,
        held_out_phrasings=_EXTRACT_HELD_OUT,
        wordings=_EXTRACT_WORDINGS,
        prose=_EXTRACT_PROSE,
    ),
    Family(
        "extract_town",
        _extract_town,
        phrasings=_EXTRACT_PHRASINGS,
        held_out_phrasings=_EXTRACT_HELD_OUT,
        wordings=_EXTRACT_WORDINGS,
        prose=_EXTRACT_PROSE,
        unseen=True,
    ),
)
