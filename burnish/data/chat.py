"""From a conversation to token ids with a weight for each: what is trained on, found by rendering. Imports no torch.

The template is a program that nobody here has read, so the mask comes from asking it: a response starts where the
conversation before it, with the generation prompt, ends, and it ends where the conversation up to it ends. Both
renders must be prefixes of the render of the whole conversation, which is tokenised once; the tokens' character
offsets then say which belong to a response.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

from burnish.data.templates import ChatTemplate, RefusedConversation
from burnish.data.tokenizer import Tokenizer
from burnish.types import Example, Message, Text
from burnish.types import Sequence as Ids


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as token ids and weights, with what there is to say about it."""

    ids: list[int]
    weights: list[float]
    responses: int = 0
    """Responses (or documents) trained on."""
    ends: tuple[int, ...] = ()
    """The end tokens that are trained, one for each of them that has one."""
    end_added: bool = False
    """Whether the end token had to be added because the template prints none."""
    remarks: tuple[str, ...] = ()


def encode(
    example: Example | Text, tokenizer: Tokenizer, template: ChatTemplate, train_on: str = "all_assistant", row: int = 0
) -> Ids:
    """A row as a Sequence: its ids, and the weight that predicting each has in the loss.

    Raises ValueError for a template whose prefixes do not hold, RefusedConversation when it declines the conversation.
    """
    encoded = encode_row(example, tokenizer, template, train_on)
    return Ids(tuple(encoded.ids), tuple(encoded.weights), row)


def encode_row(example: Example | Text, tokenizer: Tokenizer, template: ChatTemplate, train_on: str) -> Encoded:
    """The same as `encode`, with remarks for the audit."""
    if isinstance(example, Text):
        return _encode_text(example, tokenizer)
    return _encode_conversation(example, tokenizer, template, train_on)


def prompt_ids(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """The token ids after which a model writes its answer to a conversation."""
    return tokenizer.encode(template.render(messages, tools, add_generation_prompt=True))


def end_ids(tokenizer: Tokenizer, template: ChatTemplate) -> frozenset[int]:
    """Where generation should stop: at the tokens that the checkpoint names, or the one that closes a turn."""
    if template.source is None:
        return tokenizer.end_ids
    probe = Example((Message("user", "Hello"), Message("assistant", "Hello")))
    try:
        encoded = _encode_conversation(probe, tokenizer, template, "last_assistant")
    except ValueError:  # a template for other kinds of conversation: there is nothing to learn from this one
        return tokenizer.end_ids
    return tokenizer.end_ids | set(encoded.ends)


def _encode_text(text: Text, tokenizer: Tokenizer) -> Encoded:
    """Pieces as one text, with the beginning token where this tokenizer has that habit, and the end token after it."""
    ids, offsets = tokenizer.encode_with_offsets("".join(piece for piece, _ in text.pieces))
    whole = _Tokenised("".join(piece for piece, _ in text.pieces), ids, offsets)
    weights = [0.0] * len(ids)
    remarks: list[str] = []
    place = 0
    for piece, trained in text.pieces:
        if trained:
            for k in _tokens_within(whole, place, place + len(piece), remarks):
                weights[k] = 1.0
        place += len(piece)
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids, weights = [tokenizer.bos_id, *ids], [0.0, *weights]
    if not ids or ids[-1] not in tokenizer.end_ids:
        ids, weights = [*ids, _end_token(tokenizer)], [*weights, 1.0 if text.pieces and text.pieces[-1][1] else 0.0]
    ends = (ids[-1],) if weights[-1] > 0 else ()
    weights[0] = 0.0  # the first token has nothing before it to be predicted from
    return Encoded(ids, weights, responses=1, ends=ends, remarks=tuple(dict.fromkeys(remarks)))


def _encode_conversation(example: Example, tokenizer: Tokenizer, template: ChatTemplate, train_on: str) -> Encoded:
    text = template.render(example.messages, example.tools)
    if _ignores_calls(example, template, text):
        raise RefusedConversation(f"the chat template ({template.name}) does not write tool calls")
    ids, offsets = tokenizer.encode_with_offsets(text)
    whole = _Tokenised(text, ids, offsets)
    weights = [1.0 if train_on == "everything" else 0.0] * len(ids)
    turns = dict(_weighted_turns(example.messages, train_on))
    spans, remarks = _turn_spans(example, template, tokenizer, whole, list(turns))
    ends: list[int] = []
    open_end = 0.0  # the weight of the last response, when it ends without an end token
    for turn, weight in turns.items():
        within = _tokens_within(whole, *spans[turn], remarks)
        if example.messages[turn].role == "assistant":
            within, closed = _close(within, whole, tokenizer)
            if weight > 0 and closed:
                ends.append(ids[within[-1]])
            elif turn == len(example.messages) - 1:
                open_end = weight
        for k in within:
            weights[k] = weight
    if open_end:
        # Only at the very end: within a conversation it would be part of a history that generation never shows.
        ids, weights = [*ids, _end_token(tokenizer)], [*weights, open_end]
        ends.append(ids[-1])
    if weights:
        weights[0] = 0.0
    responses = sum(weight > 0 and example.messages[turn].role == "assistant" for turn, weight in turns.items())
    return Encoded(ids, weights, responses, tuple(ends), open_end > 0, tuple(dict.fromkeys(remarks)))


class _Tokenised(NamedTuple):
    """A text, its token ids, and from where to where in it each of them stands."""

    text: str
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


def _ignores_calls(example: Example, template: ChatTemplate, text: str) -> bool:
    """Whether a conversation with tool calls reads the same without them: the template passes over them."""
    if not any(message.extra.get("tool_calls") for message in example.messages):
        return False
    without = [
        replace(message, extra={name: value for name, value in message.extra.items() if name != "tool_calls"})
        for message in example.messages
    ]
    try:
        return template.render(without, example.tools) == text
    except ValueError:  # a template that asks for them writes them
        return False


def _weighted_turns(messages: Sequence[Message], train_on: str) -> Iterator[tuple[int, float]]:
    """The turns whose place in the text matters, with their weights: a message's own weight outranks train_on."""
    last = max((k for k, message in enumerate(messages) if message.role == "assistant"), default=-1)
    for number, message in enumerate(messages):
        if message.weight is not None:
            if message.weight > 0 or train_on == "everything":
                yield number, message.weight
        elif message.role == "assistant" and (train_on == "all_assistant" or number == last):
            yield number, 1.0


def _turn_spans(
    example: Example, template: ChatTemplate, tokenizer: Tokenizer, whole: _Tokenised, turns: Sequence[int]
) -> tuple[dict[int, tuple[int, int]], list[str]]:
    """Where each of these turns stands in the text: by prefixes or, if those do not hold, by the template's marks."""
    try:
        remarks: list[str] = []
        return {turn: _span(example, template, tokenizer, whole, turn, remarks) for turn in turns}, remarks
    except _Diverges as divergence:
        assistants = [k for k, message in enumerate(example.messages) if message.role == "assistant"]
        marked = template.generation_spans(example.messages, example.tools)
        if len(marked) != len(assistants) or not set(turns) <= set(assistants):
            raise ValueError(str(divergence)) from None
        remark = "the template rewrites earlier turns; responses are found by its own {% generation %} marks"
        return dict(zip(assistants, marked, strict=True)), [remark]


def _span(
    example: Example,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    whole: _Tokenised,
    turn: int,
    remarks: list[str],
) -> tuple[int, int]:
    """From and to of one turn in the text of the whole conversation. Raises _Diverges when prefixes do not hold."""
    text = whole.text

    def length(count: int) -> int:
        """Of the text of the first `count` turns; an end token that only the end of a text has is left out of it."""
        prefix = template.render(example.messages[:count], example.tools)
        closing = tokenizer.special.get("eos_token") or ""
        for found in (prefix, prefix.removesuffix(closing)):
            if text.startswith(found):
                return len(found)
        raise _Diverges(template, turn, prefix, text, count)

    end = len(text) if turn == len(example.messages) - 1 else length(turn + 1)
    if not turn:
        return 0, end
    if example.messages[turn].role != "assistant":
        return length(turn), end
    prompt = template.render(example.messages[:turn], example.tools, add_generation_prompt=True)
    if text.startswith(prompt):
        return len(prompt), end
    # The turn opens like the generation prompt, but not to its end (a `<think>` that only generation prints, say):
    # what the two share is counted in tokens, since a first character in common does not make a token common.
    before = length(turn)
    pairs = zip(tokenizer.encode(prompt), whole.ids, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    shared = max(before, whole.offsets[common - 1][1] if common else 0)
    remarks.append(
        f"generation starts from {prompt[before:]!r} but the training text there has only "
        f"{text[before:shared]!r}; what follows that is trained"
    )
    return shared, end


class _Diverges(Exception):
    """The render of a part of a conversation is no prefix of the render of the whole."""

    def __init__(self, template: ChatTemplate, turn: int, prefix: str, text: str, count: int) -> None:
        place = _shared(prefix, text)
        near = slice(max(0, place - 20), place + 30)
        alone, within = f"...{prefix[near]!r}", f"...{text[near]!r}"
        super().__init__(
            f"the chat template ({template.name}) writes earlier turns differently once later ones follow, so turn "
            f"{turn} cannot be found in the text: the first {count} turns alone give {alone}, the whole conversation "
            f"gives {within}; write data.train_on=last_assistant, which needs only the last response, or another "
            "model.template"
        )


def _tokens_within(whole: _Tokenised, start: int, end: int, remarks: list[str]) -> list[int]:
    """The tokens that stand for characters of start..end and for none outside, but for spaces just before."""
    within: list[int] = []
    first = bisect_left(whole.offsets, start, key=lambda offset: offset[0])
    if first and whole.offsets[first - 1][1] > start:  # a token begins before the response and ends in it
        a, b = whole.offsets[first - 1]
        if whole.text[a:start].isspace() and b <= end:
            within.append(first - 1)
            remarks.append("the first token of the response takes the space before it along, and is trained")
        else:
            remarks.append(f"the token {whole.text[a:b]!r} is prompt and response at once, and is not trained")
    for k in range(first, len(whole.offsets)):
        a, b = whole.offsets[k]
        if a >= end and b > end:
            break
        if start < b <= end:  # an empty token at the left border belongs to what stands before it
            within.append(k)
    return within


def _close(within: list[int], whole: _Tokenised, tokenizer: Tokenizer) -> tuple[list[int], bool]:
    """A response's tokens up to its end token, without the line break that may follow; and whether there is one."""
    text, ids, offsets = whole
    for count in range(len(within), 0, -1):
        k = within[count - 1]
        if ids[k] in tokenizer.special_ids or ids[k] in tokenizer.end_ids:
            return within[:count], True
        a, b = offsets[k]
        if text[a:b].strip():
            break
    following = within[-1] + 1 if within else len(ids)
    if following < len(ids) and ids[following] in tokenizer.end_ids:
        return [*within, following], True  # a template that prints the end token as the start of the next turn
    return within, False


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _end_token(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is not None:
        return tokenizer.eos_id
    if tokenizer.end_ids:
        return min(tokenizer.end_ids)
    raise ValueError(
        f"the tokenizer in {tokenizer.folder} names no end token: give it an eos_token in tokenizer_config.json"
    )
