"""Families about the letters of words and about lists of words."""

import random

from burnish.world.family import Case, Family
from burnish.world.lexicon import KIND_OF, KINDS, ORDINALS, SPELLED, spaced


def _word(rng: random.Random) -> str:
    return rng.choice(SPELLED)


def _spell(rng: random.Random) -> Case:
    word = _word(rng)
    return Case({"w": word}, spaced(word), word)


def _join(rng: random.Random) -> Case:
    word = _word(rng)
    return Case({"letters": spaced(word)}, word, word)


def _reverse(rng: random.Random) -> Case:
    word = _word(rng)
    return Case({"w": word, "letters": spaced(word)}, spaced(word[::-1]), word)


def _first_letter(rng: random.Random) -> Case:
    word = _word(rng)
    return Case({"w": word}, word[0], word)


def _last_letter(rng: random.Random) -> Case:
    word = _word(rng)
    return Case({"w": word}, word[-1], word)


def _count_letters(rng: random.Random) -> Case:
    word = _word(rng)
    return Case({"w": word, "letters": spaced(word)}, str(len(word)), word)


def _words(rng: random.Random, fewest: int, most: int) -> list[str]:
    """Different words, of one kind or of many."""
    pool = rng.choice(tuple(KINDS.values())) if rng.random() < 0.5 else tuple(KIND_OF)
    return rng.sample(pool, rng.randint(fewest, most))


def _sort_words(rng: random.Random) -> Case:
    # Words that differ in their first letter: the order can be read off those letters alone.
    by_letter: dict[str, str] = {}
    while len(by_letter) < 3:
        by_letter = {word[0]: word for word in _words(rng, 5, 6)}
    words = list(by_letter.values())[: rng.randint(3, 4)]
    rng.shuffle(words)
    answer = ", ".join(sorted(words))
    return Case({"list": ", ".join(words)}, answer, answer)


def _pick(rng: random.Random) -> Case:
    words = _words(rng, 3, 5)
    place = rng.randrange(len(words))
    return Case({"list": ", ".join(words), "place": ORDINALS[place]}, words[place], " ".join((*words, str(place))))


def _count_words(rng: random.Random) -> Case:
    words = _words(rng, 2, 6)
    return Case({"list": ", ".join(words)}, str(len(words)), " ".join(words))


FAMILIES = (
    Family(
        "spell",
        _spell,
        phrasings=("Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "Write the letters of {w}."),
        held_out_phrasings=("Tell me how to spell {w}.", "Which letters is the word {w} made of?"),
        wordings=(
            "Here is a word: {w}. Spell it.",
            "Say the letters of {w} one by one.",
            "From which letters do you make {w}?",
        ),
        prose=(
            "The word {w} is spelled {answer}.",
            "You spell {w} like this: {answer}.",
            "{answer} are the letters of {w}.",
            "Letter by letter, {w} is {answer}.",
        ),
    ),
    Family(
        "word_from_letters",
        _join,
        phrasings=(
            "Which word is spelled {letters}?",
            "What word do the letters {letters} make?",
            "Join the letters {letters}.",
        ),
        held_out_phrasings=("Tell me which word is spelled {letters}.", "Write {letters} as one word."),
        wordings=(
            "Here are letters: {letters}. Which word is it?",
            "Say {letters} as a word.",
            "Put the letters {letters} together.",
        ),
        prose=(
            "{letters} spells {answer}.",
            "The letters {letters} make the word {answer}.",
            "Join {letters} and you get {answer}.",
        ),
        unseen=True,
    ),
    Family(
        "reverse",
        _reverse,
        phrasings=(
            "Write {w} backwards.",
            "Spell {w} backwards.",
            "Write the letters of {w} from last to first.",
            "How is the word {w} spelled backwards?",
        ),
        held_out_phrasings=("Tell me how to spell {w} backwards.", "Take the word {w} and write it backwards."),
        wordings=(
            "Here is a word: {w}. Spell it backwards.",
            "Turn the word {w} round.",
            "Say the letters of {w} backwards, one by one.",
        ),
        prose=(
            "The word {w} written backwards is {answer}.",
            "{w} spelled backwards is {answer}.",
            "Backwards, {letters} becomes {answer}.",
            "From last to first the letters of {w} are {answer}.",
        ),
    ),
    Family(
        "first_letter",
        _first_letter,
        phrasings=(
            "What is the first letter of {w}?",
            "Which letter does {w} begin with?",
            "Name the first letter of the word {w}.",
            "Write the first letter of {w}.",
        ),
        held_out_phrasings=("Tell me the first letter of {w}.", "With which letter does the word {w} begin?"),
        wordings=(
            "Here is a word: {w}. What is its first letter?",
            "Do you know the letter that begins {w}?",
            "At the start of {w}, which letter stands there?",
        ),
        prose=(
            "The first letter of {w} is {answer}.",
            "{w} begins with the letter {answer}.",
            "The word {w} begins with {answer}.",
        ),
    ),
    Family(
        "last_letter",
        _last_letter,
        phrasings=(
            "What is the last letter of {w}?",
            "Which letter does {w} end with?",
            "Name the last letter of the word {w}.",
            "Write the last letter of {w}.",
        ),
        held_out_phrasings=("Tell me the last letter of {w}.", "With which letter does the word {w} end?"),
        wordings=(
            "Here is a word: {w}. What is its last letter?",
            "Do you know the letter that ends {w}?",
            "At the end of {w}, which letter stands there?",
        ),
        prose=(
            "The last letter of {w} is {answer}.",
            "{w} ends with the letter {answer}.",
            "The word {w} ends with {answer}.",
        ),
        unseen=True,
    ),
    Family(
        "count_letters",
        _count_letters,
        phrasings=(
            "How many letters are in {w}?",
            "How many letters does the word {w} have?",
            "Count the letters of {w}.",
            "What is the number of letters in {w}?",
        ),
        held_out_phrasings=("Tell me how many letters {w} has.", "How long is the word {w}, in letters?"),
        wordings=(
            "Here is a word: {w}. How many letters has it?",
            "Of how many letters is {w} made?",
            "How many letters do you need to write {w}?",
        ),
        prose=(
            "The word {w} has {answer} letters.",
            "There are {answer} letters in {w}.",
            "{letters}: {answer} letters make the word {w}.",
        ),
    ),
    Family(
        "sort_words",
        _sort_words,
        phrasings=(
            "Sort these words: {list}.",
            "Put the words {list} in alphabetical order.",
            "Order these words from a to z: {list}.",
            "Write the words {list} in alphabetical order.",
        ),
        held_out_phrasings=(
            "Look at the words {list}. Put them in alphabetical order.",
            "Arrange these words from a to z: {list}.",
        ),
        wordings=(
            "Here are words: {list}. Sort them.",
            "In which order do the words {list} stand in a dictionary?",
            "Arrange the words {list}.",
        ),
        prose=(
            "The words {list} in alphabetical order are {answer}.",
            "Sorted, the words {list} are {answer}.",
            "From a to z, {list} become {answer}.",
        ),
    ),
    Family(
        "pick_word",
        _pick,
        phrasings=(
            "Which word comes {place} in the list {list}?",
            "What is the {place} word of {list}?",
            "Name the {place} word: {list}.",
            "Find the {place} word in the list {list}.",
        ),
        held_out_phrasings=(
            "Look at the list {list}. Which word comes {place}?",
            "Tell me the {place} word of {list}.",
        ),
        wordings=(
            "Here is a list: {list}. Which word is {place}?",
            "In {list}, which one stands {place}?",
            "From the list {list} take the {place} word.",
        ),
        prose=(
            "In the list {list} the {place} word is {answer}.",
            "The {place} word of {list} is {answer}.",
            "Of the words {list}, {answer} comes {place}.",
        ),
    ),
    Family(
        "count_words",
        _count_words,
        phrasings=(
            "How many words are in the list {list}?",
            "Count the words: {list}.",
            "How many things are named here: {list}?",
        ),
        held_out_phrasings=(
            "Look at the list {list}. How many words are in it?",
            "Tell me how many words these are: {list}.",
        ),
        wordings=(
            "Here is a list: {list}. How many words has it?",
            "In {list}, how many words do you see?",
            "Of how many words is the list {list} made?",
        ),
        prose=(
            "The list {list} has {answer} words.",
            "There are {answer} words in the list {list}.",
            "{list}: that makes {answer} words.",
        ),
        unseen=True,
    ),
)
