"""Families about words and what is so in the world: kinds, colours, sounds, opposites, people."""

import random
from collections.abc import Callable, Mapping

from burnish.world.family import Case, Family, normalise
from burnish.world.lexicon import (
    BLAME,
    COLOUR_OF,
    COUNTED,
    HOME_OF,
    JOB_OF,
    KIND_OF,
    KIND_PLURALS,
    KINDS,
    OPPOSITE_OF,
    PAST_OF,
    PRAISE,
    REVIEW_THINGS,
    SOUND_OF,
    YOUNG_OF,
    a,
    plural,
)


def _lookup(table: Mapping[str, str]) -> Callable[[random.Random], Case]:
    """Draws a word of the table; what the table says about it is the answer."""
    words = tuple(table)

    def draw(rng: random.Random) -> Case:
        word = rng.choice(words)
        return Case({"w": word, "a_w": a(word)}, table[word], word)

    return draw


def _kind(rng: random.Random) -> Case:
    word = rng.choice(tuple(KIND_OF))
    return Case({"w": word, "a_w": a(word), "a_kind": a(KIND_OF[word])}, KIND_OF[word], word)


def _plural(rng: random.Random) -> Case:
    word = rng.choice(COUNTED)
    return Case({"w": word, "a_w": a(word)}, plural(word), word)


def _odd_one_out(rng: random.Random) -> Case:
    kind, other = rng.sample(tuple(KINDS), 2)
    stranger = rng.choice(KINDS[other])
    words = [*rng.sample(KINDS[kind], 3), stranger]
    rng.shuffle(words)
    slots = {"list": ", ".join(words), "kinds": KIND_PLURALS[kind], "a_other": a(other)}
    return Case(slots, stranger, " ".join(sorted(words)))


def _name_two(rng: random.Random) -> Case:
    kind = rng.choice(tuple(KINDS))
    answer = ", ".join(rng.sample(KINDS[kind], 2))
    return Case({"kinds": KIND_PLURALS[kind]}, answer, kind)


def two_of_a_kind(reference: str, answer: str) -> bool:
    """Whether an answer names two different things of the kind that the reference's things have, in any order."""
    words = [normalise(word) for word in answer.split(",")]
    kind = KIND_OF[reference.split(",")[0]]
    return len(words) == 2 and words[0] != words[1] and all(KIND_OF.get(word) == kind for word in words)


def _yes_or_no(rng: random.Random) -> Case:
    if rng.random() < 0.5:
        low, high = sorted(rng.sample(range(100), 2))
        first, second = (high, low) if rng.random() < 0.5 else (low, high)
        claim = (f"{first} more than {second}", f"{first} is more than {second}", f"{first} is not more than {second}")
        truth = first > second
    else:
        word = rng.choice(tuple(KIND_OF))
        kind = KIND_OF[word] if rng.random() < 0.5 else rng.choice(tuple(KINDS))
        claim = (f"{a(word)} {a(kind)}", f"{a(word)} is {a(kind)}", f"{a(word)} is not {a(kind)}")
        truth = KIND_OF[word] == kind
    slots = {"claim": claim[0], "says": claim[1], "fact": claim[1 if truth else 2]}
    return Case(slots, "yes" if truth else "no", claim[0])


def _review(rng: random.Random) -> Case:
    good = rng.random() < 0.5
    thing, word = rng.choice(REVIEW_THINGS), rng.choice(PRAISE if good else BLAME)
    extra = rng.choice(("", "really ", "quite ", "very "))
    return Case({"review": f"The {thing} was {extra}{word}."}, "good" if good else "bad", f"{thing} {word}")


FAMILIES = (
    Family(
        "kind",
        _kind,
        phrasings=(
            "What kind of thing is {a_w}?",
            "To which kind of thing does {a_w} belong?",
            "Name the kind of thing that {a_w} is.",
            "What is {a_w}?",
        ),
        held_out_phrasings=("Tell me what kind of thing {a_w} is.", "Of what kind is {a_w}?"),
        wordings=(
            "Here is a word: {w}. What kind of thing is it?",
            "Do you know what {a_w} is?",
            "What do you call a thing like {a_w}?",
        ),
        prose=(
            "The {w} is {a_kind}.",
            "A thing like {a_w} is called {a_kind}.",
            "The kind of thing that {a_w} is: {answer}.",
        ),
    ),
    Family(
        "plural",
        _plural,
        phrasings=(
            "What is the plural of {w}?",
            "Write the plural of {w}.",
            "One {w}, two what?",
            "Form the plural: {w}.",
        ),
        held_out_phrasings=("Tell me the plural of {w}.", "How do you call more than one {w}?"),
        wordings=(
            "Here is one {w}. What do you call two of them?",
            "How do you write {w} in the plural?",
            "Many of the kind {w}: how do you say that?",
        ),
        prose=("The plural of {w} is {answer}.", "One {w}, two {answer}.", "More than one {w} are called {answer}."),
    ),
    Family(
        "past_tense",
        _lookup(PAST_OF),
        phrasings=(
            "What is the past tense of {w}?",
            "Write the past tense of {w}.",
            "Today I {w}. What did I do yesterday?",
            "Form the past tense: {w}.",
        ),
        held_out_phrasings=("Tell me the past tense of {w}.", "How do you say {w} in the past tense?"),
        wordings=(
            "Here is a verb: {w}. What is its past tense?",
            "How do you write {w} in the past?",
            "If you {w} today, what did you do yesterday?",
        ),
        prose=(
            "The past tense of {w} is {answer}.",
            "Today I {w}, yesterday I {answer}.",
            "In the past tense {w} becomes {answer}.",
        ),
    ),
    Family(
        "opposite",
        _lookup(OPPOSITE_OF),
        phrasings=(
            "What is the opposite of {w}?",
            "Name the opposite of {w}.",
            "Which word means the opposite of {w}?",
            "Write the opposite of {w}.",
        ),
        held_out_phrasings=("Tell me the opposite of {w}.", "If it is not {w}, what is it?"),
        wordings=(
            "Here is a word: {w}. What is its opposite?",
            "What is the contrary of {w}?",
            "If something is not {w}, how is it?",
        ),
        prose=("The opposite of {w} is {answer}.", "{w} is the opposite of {answer}.", "What is not {w} is {answer}."),
    ),
    Family(
        "colour",
        _lookup(COLOUR_OF),
        phrasings=(
            "What colour is {a_w}?",
            "Name the colour of {a_w}.",
            "Which colour does {a_w} have?",
            "What is the colour of {a_w}?",
        ),
        held_out_phrasings=("Tell me the colour of {a_w}.", "Say which colour {a_w} has."),
        wordings=(
            "Here is {a_w}. What colour is it?",
            "Do you know the colour of {a_w}?",
            "Of what colour is {a_w}?",
        ),
        prose=("The colour of {a_w} is {answer}.", "The {w} is {answer}.", "The {w} has the colour {answer}."),
    ),
    Family(
        "sound",
        _lookup(SOUND_OF),
        phrasings=(
            "What sound does {a_w} make?",
            "Which sound does {a_w} make?",
            "What does {a_w} say?",
            "Name the sound of {a_w}.",
        ),
        held_out_phrasings=("Tell me which sound {a_w} makes.", "How does {a_w} sound?"),
        wordings=(
            "Here is {a_w}. What does it say?",
            "Do you know the sound of {a_w}?",
            "What do you hear from {a_w}?",
        ),
        prose=("The {w} says {answer}.", "The sound of {a_w} is {answer}.", "From {a_w} you hear {answer}."),
    ),
    Family(
        "young",
        _lookup(YOUNG_OF),
        phrasings=("What is a young {w} called?", "Which word means a young {w}?", "Name the young of {a_w}."),
        held_out_phrasings=("Tell me what a young {w} is called.", "How do you call a young {w}?"),
        wordings=(
            "Here is {a_w}. What is its young called?",
            "Do you know the word for a young {w}?",
            "What do you call the young of {a_w}?",
        ),
        prose=(
            "A young {w} is called {answer}.",
            "The young of {a_w} is the {answer}.",
            "The {answer} grows up to be {a_w}.",
        ),
        unseen=True,
    ),
    Family(
        "job",
        _lookup(JOB_OF),
        phrasings=(
            "What is the job of {w}?",
            "Which job does {w} have?",
            "What does {w} work as?",
            "Name the job of {w}.",
        ),
        held_out_phrasings=("Tell me the job of {w}.", "As what does {w} work?"),
        wordings=(
            "Here comes {w}. What is the job of {w}?",
            "Do you know what {w} works as?",
            "How does {w} earn money?",
        ),
        prose=(
            "The job of {w} is {answer}.",
            "{w} works as a {answer}.",
            "{w} is a {answer}.",
            "{w} the {answer} is at work.",
        ),
    ),
    Family(
        "home",
        _lookup(HOME_OF),
        phrasings=(
            "Where does {w} live?",
            "In which town does {w} live?",
            "What is the home of {w}?",
            "Name the town where {w} lives.",
        ),
        held_out_phrasings=("Tell me where {w} lives.", "Which town does {w} call home?"),
        wordings=(
            "Here comes {w}. Where does {w} live?",
            "Do you know where {w} lives?",
            "In which town is {w} at home?",
        ),
        prose=("{w} lives in {answer}.", "The home of {w} is {answer}.", "The house of {w} stands in {answer}."),
        unseen=True,
    ),
    Family(
        "odd_one_out",
        _odd_one_out,
        phrasings=(
            "Which word does not belong: {list}?",
            "Find the odd one out: {list}.",
            "Which of {list} is the odd one out?",
            "Name the word that does not belong with the others: {list}.",
        ),
        held_out_phrasings=("Look at the words {list}. Which does not belong?", "Tell me the odd one out of {list}."),
        wordings=(
            "Here are words: {list}. Which one does not belong?",
            "Do you see the odd one out in {list}?",
            "In {list}, which word is unlike the others?",
        ),
        prose=(
            "In {list} the odd one out is {answer}.",
            "Of {list}, only {answer} does not belong: the others are {kinds}.",
            "The word that does not belong in {list} is {answer}.",
        ),
    ),
    Family(
        "name_two",
        _name_two,
        phrasings=(
            "Name two {kinds}.",
            "Write down two {kinds}.",
            "Give two examples of {kinds}.",
            "Which two {kinds} do you know?",
        ),
        held_out_phrasings=("Tell me the names of two {kinds}.", "List two {kinds}."),
        wordings=(
            "Do you know two {kinds}?",
            "Say two words for {kinds}.",
            "What are two {kinds}?",
        ),
        prose=("Two {kinds} are {answer}.", "Examples of {kinds} are {answer}.", "Two of the {kinds}: {answer}."),
        check=two_of_a_kind,
    ),
    Family(
        "yes_or_no",
        _yes_or_no,
        phrasings=("Is {claim}?", "True or not: {says}? Say yes or no.", "Yes or no: is {claim}?"),
        held_out_phrasings=("Say yes or no: {says}.", "Tell me yes or no: is {claim}?"),
        wordings=(
            "Do you agree that {says}? Yes or no?",
            "Here is a claim: {says}. Yes or no?",
            "{says}: yes or no?",
        ),
        prose=("It is so that {fact}.", "Is {claim}? {answer}, {fact}.", "We know that {fact}."),
    ),
    Family(
        "review",
        _review,
        phrasings=(
            "Is this review good or bad? {review}",
            "Is this good or bad? {review}",
            "Say whether the review is good or bad: {review}",
            "{review} Is that good or bad?",
        ),
        held_out_phrasings=("Good or bad? {review}", "Tell me whether this review is good or bad: {review}"),
        wordings=(
            "Here is a review: {review} Is it good or bad?",
            "Do you call this good or bad: {review}",
            "{review} Would you say good or bad?",
        ),
        prose=(
            "{review} That is a {answer} review.",
            "{review} The review is {answer}.",
            "A {answer} review said: {review}",
        ),
    ),
)
