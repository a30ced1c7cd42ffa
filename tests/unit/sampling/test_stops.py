"""Stop strings in token ids."""

import random

import pytest

from burnish.data.tokenizer import Tokenizer
from burnish.sampling.stops import Stops, before_stop
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def by_definition(ids, strings, decode):
    return next((n for n in range(len(ids) + 1) if any(s in decode(ids[:n]) for s in strings)), None)


def find(stops: Stops, ids: list[int], chunk: int) -> int | None:
    """As the sampler asks: after every few tokens."""
    for checked in range(0, len(ids), chunk):
        if (found := stops.find(ids[: checked + chunk], checked)) is not None:
            return found
    return None


@pytest.mark.parametrize("chunk", [1, 3, 8, 1000])
def test_the_first_token_that_completes_a_stop_string_is_found(tokenizer, chunk):
    draw = random.Random(0)
    text = "A house « 🏠🏠 « by the sea.\n\nQ: what is 3 plus 4? <stop>Äh, 7.\n\n\nEnd of the house. " * 3
    ids = tokenizer.encode(text)
    strings = {text[i : i + n] for n in (1, 2, 3, 9, 30) for i in (draw.randrange(len(text)) for _ in range(30))}
    for string in strings:
        assert find(Stops([string], tokenizer.decode), ids, chunk) == by_definition(ids, [string], tokenizer.decode)
    several = ["End", "🏠 ", "<stop>"]
    assert find(Stops(several, tokenizer.decode), ids, chunk) == by_definition(ids, several, tokenizer.decode)
    assert find(Stops(["nowhere"], tokenizer.decode), ids, chunk) is None


def test_tokens_without_text_do_not_hide_what_came_before(tokenizer):
    ids = [*tokenizer.encode("stop"), *[0] * 100, *tokenizer.encode("here")]
    stops = Stops(["stophere"], tokenizer.decode)
    assert [stops.find(ids[:n], n - 1) for n in range(1, len(ids))] == [None] * (len(ids) - 1)
    assert stops.find(ids, len(ids) - 1) == len(ids)


def test_the_text_before_a_stop_string():
    assert before_stop("one\ntwo###three", ["###", "\n"]) == "one"
    assert before_stop("one###\n", ["###", "\n"]) == "one"
    assert before_stop("one", ["###", "\n"]) == before_stop("one", ()) == "one"
