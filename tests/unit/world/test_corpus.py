"""The plain text: deterministic, true, free of chat, and free of what the instruction rows hold out."""

import re
from itertools import islice

from burnish.world import FAMILIES, documents, general_documents, general_text
from burnish.world.lexicon import HOME_OF, JOB_OF, KIND_OF, OPPOSITE_OF, PAST_OF, plural

TEXT = "\n".join(islice(documents(3), 3000))


def statements(pattern: str, at_least: int) -> list[tuple[str, ...]]:
    """The statements of the corpus that a pattern finds: there must be enough of them to mean anything."""
    found = re.findall(pattern, TEXT)
    assert len(found) >= at_least, (pattern, len(found))
    return found


def test_same_documents_from_the_same_seed():
    assert list(islice(documents(1), 20)) == list(islice(documents(1), 20))
    assert list(islice(documents(1), 20)) != list(islice(documents(2), 20))


def test_general_text_is_the_corpus_kind_but_not_in_it():
    general = general_documents()
    assert general_text() == "\n\n".join(general)
    assert not set(general) & {*islice(documents(0), 2000), *islice(documents(1), 2000)}


def test_no_chat_in_the_corpus():
    for mark in ("<|", "|>", "[INST]", "user:", "User:", "Assistant", "assistant", "###"):
        assert mark not in TEXT


def test_paragraphs_begin_with_a_space_and_documents_end_on_a_statement():
    for text in islice(documents(0), 300):
        assert all(line.startswith(" ") and line.strip() for line in text.split("\n"))
        assert text.endswith(".")


def test_held_out_phrasings_are_not_in_the_corpus():
    text = TEXT[: len(TEXT) // 3]  # a search for each phrasing takes its time
    for family in FAMILIES.values():
        for phrasing in family.held_out_phrasings:
            # A story or a sentence brings its own full stops; the other slots hold words.
            whole = any(slot in phrasing for slot in ("{story}", "{sentence}", "{review}"))
            slot = r"[^\n]{1,120}?" if whole else r"[^\n.?!:]{1,60}?"
            parts = [re.escape(part) for part in re.split(r"\{\w+\}", phrasing)]
            assert not re.search(rf"\b{slot.join(parts)}", text), phrasing


def test_every_family_is_stated_and_asked():
    for family in FAMILIES.values():
        for wordings in (family.prose, family.phrasings, family.wordings):
            fixed = [max(re.split(r"\{\w+\}", wording), key=len) for wording in wordings]
            assert any(part in TEXT for part in fixed), family.name


def test_arithmetic_is_true():
    for a, b, c in statements(r"\b(\d+) plus (\d+) is (\d+)\.", 100):
        assert int(a) + int(b) == int(c)
    for a, b, c in statements(r"\b(\d+) minus (\d+) is (\d+)\.", 100):
        assert int(a) - int(b) == int(c)
    for a, b in statements(r"largest of ([\d, ]+) is (\d+)\.", 20):
        assert max(map(int, a.split(","))) == int(b)
    for a, b in statements(r"numbers ([\d, ]+) in order are ([\d, ]+)\.", 30):
        assert sorted(map(int, a.split(","))) == [int(number) for number in b.split(",")]
    for number, parity in statements(r"\bnumber (\d+) is (even|odd)\.", 20):
        assert (int(number) % 2 == 1) == (parity == "odd")


def test_letters_are_true():
    for word, letters in statements(r"word (\w+) is spelled ((?:\w )+\w)\b", 30):
        assert letters == " ".join(word)
    for word, letters in statements(r"word (\w+) written backwards is ((?:\w )+\w)\.", 30):
        assert letters == " ".join(reversed(word))
    for word, count in statements(r"The word (\w+) has (\d+) letters", 20):
        assert len(word) == int(count)
    for words, ordered in statements(r"words ([a-z, ]+) in alphabetical order are ([a-z, ]+)\.", 20):
        assert sorted(words.split(", ")) == ordered.split(", ")


def test_facts_are_the_lexicon_s():
    for name, town in statements(r"(\w+) lives in (\w+)\.", 30):
        assert HOME_OF[name] == town
    for name, job in statements(r"(\w+) works as a (\w+)\.", 30):
        assert JOB_OF[name] == job
    for word, other in statements(r"opposite of (\w+) is (\w+)\.", 20):
        assert OPPOSITE_OF[word] == other
    for one, many in statements(r"plural of (\w+) is (\w+)\.", 20):
        assert plural(one) == many
    for verb, past in statements(r"past tense of (\w+) is (\w+)\.", 20):
        assert PAST_OF[verb] == past
    for word, kind in statements(r"The (\w+) is an? (bird|fish|insect|mammal|fruit|tree|tool)\.", 20):
        assert KIND_OF[word] == kind


def test_stories_end_as_told():
    for giver, thing, taker, owner in statements(
        r"(\w+) had an? \w+ (\w+)\. \1 gave it to (\w+)\. (?:So|In the end|Now we know that) (\w+) has the \2\.", 10
    ):
        assert giver != owner == taker, thing


def test_articles_fit():
    assert not re.search(r"\ba (?:orange|owl|ant|eagle|apple|onion|axe|iris|orchid|aster|oak|elm|eel|insect)\b", TEXT)
    assert not re.search(r"\ban (?:cat|red|blue|bird|fish|baker)\b", TEXT)
