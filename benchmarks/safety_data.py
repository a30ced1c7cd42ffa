"""What the comparison of FP8 with bf16 trains on and measures: the embedded world, the same every time."""

import multiprocessing
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy

from burnish.data.chat import encode
from burnish.data.corpus import Corpus
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.evaluate.judge import general_sequences
from burnish.model.families import find_model, read_json
from burnish.types import Example, Message, Text
from burnish.types import Sequence as TokenSequence
from burnish.world import FAMILIES, SEEN, UNSEEN, documents
from burnish.world.instructions import is_held_out, new_questions


class Scale(NamedTuple):
    """How much of everything."""

    width: int
    inner: int
    layers: int
    heads: int
    step_tokens: int = 2048
    """Of a step with LoRA: about one pass over all questions in 1,000 steps, and half the device time of 4,096."""
    pretrain_tokens: int = 32768
    """Of a step of pre-training."""
    pass_tokens: int = 16384
    shard: int = 500
    """Documents that one worker writes at a time; what they hold does not depend on how many workers there are."""
    held_out: tuple[int, int, int] = (64, 128, 10_000)
    """Questions of each family that has training rows, of each other family, and sequences of plain text."""
    pace: tuple[int, int] = (10, 10)
    """Steps of pre-training before its pace is taken, and steps that it is taken from."""


SCALES = {  # 0.2, 156 and 280 million parameters
    "tiny": Scale(64, 128, 2, 4, 128, 2048, 1024, 4, (1, 2, 1), (1, 1)),
    "150m": Scale(1024, 2816, 12, 16),
    "300m": Scale(1280, 3456, 14, 20),
}
MAX_LENGTH = 1024
TOKENS_PER_DOCUMENT, TOKENS_PER_QUESTION = 340, 10
"""About. A question has 25, but most families have fewer of them than they would have to give."""

T = TypeVar("T")
R = TypeVar("R")


class Data(NamedTuple):
    """What is trained on, and what is measured."""

    text: Corpus
    questions: Corpus
    held_out: Mapping[str, Sequence[TokenSequence]]


def make_data(scale: Scale, pretrain_tokens: int, steps: int, workers: int) -> Data:
    """Text for pre-training, questions enough for so many steps, and what is held out: the same every time."""
    shards = -(-pretrain_tokens // (TOKENS_PER_DOCUMENT * scale.shard))
    count = scale.shard if shards > 1 else -(-pretrain_tokens // TOKENS_PER_DOCUMENT)
    most = max(10, steps * scale.step_tokens // (TOKENS_PER_QUESTION * len(SEEN)))
    text = joined(spread(partial(shard, count=count), range(shards), workers))
    questions = joined(spread(partial(training_questions, most=most), SEEN, workers))
    tokenizer = Tokenizer.load(find_model("embedded"))
    template = ChatTemplate.open("auto", tokenizer)
    seen, unseen, general = scale.held_out
    held_out = {
        "seen": [one for name in SEEN for one in held_out_questions(name, seen, tokenizer)],
        "unseen": [one for name in UNSEEN for one in held_out_questions(name, unseen, tokenizer)],
        "general": general_sequences("embedded", tokenizer, template, MAX_LENGTH)[:general],
    }
    return Data(text, questions, held_out)


def spread(work: Callable[[T], R], given: Sequence[T], workers: int) -> list[R]:
    """What the work makes of each, in order, by so many processes."""
    if workers == 1:
        return [work(one) for one in given]
    with multiprocessing.get_context("fork").Pool(workers) as pool:  # nothing has used threads or CUDA yet
        return pool.map(work, given, chunksize=1)


def shard(seed: int, count: int) -> Corpus:
    """The first documents of a seed, every token of them trained."""
    tokenizer = Tokenizer.load(find_model("embedded"))
    template, texts = ChatTemplate.open("auto", tokenizer), islice(documents(seed), count)
    return Corpus.of(encode(Text(((text, True),)), tokenizer, template, row=i) for i, text in enumerate(texts))


def training_questions(name: str, most: int) -> Corpus:
    """New questions of a family, until there are so many, or hardly any more that differ."""
    tokenizer = Tokenizer.load(find_model("embedded"))
    found: dict[str, str] = {}
    for draw in range(12):
        before = len(found)
        found |= dict(islice(new_questions(FAMILIES[name], f"safety {draw}"), most))
        if len(found) >= most or len(found) < 1.05 * before:
            break
    return Corpus.of(conversations(list(found.items())[:most], tokenizer))


def held_out_questions(name: str, most: int, tokenizer: Tokenizer) -> list[TokenSequence]:
    """Questions of a family that no training row asks, in wordings of which half are held out as well."""
    family, rng = FAMILIES[name], random.Random(f"safety held out {name}")
    found: dict[str, str] = {}
    for _ in range(100 * most):
        case = family.draw(rng)
        if len(found) < most and (family.unseen or is_held_out(family, case)):
            wordings = (family.phrasings, family.held_out_phrasings)[len(found) % 2]
            found.setdefault(rng.choice(wordings).format(**case.slots), case.answer)
    return conversations(list(found.items()), tokenizer)


def conversations(asked: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[TokenSequence]:
    """Questions and answers in the chat template, the answers trained."""
    template = ChatTemplate.open("auto", tokenizer)
    turns = [Example((Message("user", question), Message("assistant", answer))) for question, answer in asked]
    return [encode(example, tokenizer, template, row=i) for i, example in enumerate(turns)]


def joined(parts: Sequence[Corpus]) -> Corpus:
    """One corpus of several, its rows counted anew."""
    lengths = numpy.concatenate([part.lengths for part in parts])
    return Corpus(
        numpy.concatenate([part.ids for part in parts]),
        numpy.concatenate([part.weights for part in parts]),
        numpy.concatenate([numpy.zeros(1, numpy.int64), numpy.cumsum(lengths)]),
        numpy.arange(len(lengths), dtype=numpy.int32),
    )


def config_of(scale: Scale) -> dict[str, Any]:
    """The configuration of a Llama of this size, with the vocabulary of the embedded base."""
    sizes = {"hidden_size": scale.width, "intermediate_size": scale.inner, "num_hidden_layers": scale.layers}
    sizes |= {"num_attention_heads": scale.heads, "num_key_value_heads": scale.heads}
    return read_json(find_model("embedded")) | sizes | {"head_dim": scale.width // scale.heads}
