"""Rows in which answers are compared: how their columns are recognised and read. Imports no torch.

The prompt may have a column of its own, and answers may or may not repeat it; or there is none, and it is what the
answers begin with in common. Listed, like every other format, in `formats.FORMATS`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.data.files import kind_of
from burnish.data.turns import conversation_of, dialogue_of, text_of, tools_of
from burnish.types import Judged, Message, Preference

Turns = tuple[Message, ...]

PROMPTS = ("prompt", "question", "instruction")
"""The columns that a prompt may stand in."""
ANSWERS = ("answers", "responses")
PLACES = ("ranks", "rankings", "rank")
"""Columns, or keys of an answer, that say which answer is better: the lowest number is the best answer's."""
SCORES = ("scores", "score")
"""The same, but the highest is the best answer's."""
TEXTS = ("answer", "response", "text", "content")
"""Where an answer that is an object may have its text."""
PAIR_COLUMNS = frozenset({"chosen", "rejected", "margin", "score_chosen", "score_rejected", "tools", "task"})
PROMPT_COLUMNS = frozenset({*PROMPTS, "system", "input"})


def fits_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row has a prompt and two answers to it."""
    return _has_pair(row) and _prompt_column(row) is not None


def fits_whole_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row has two whole conversations, and no prompt."""
    return _has_pair(row) and _prompt_column(row) is None


def fits_ranked(row: Mapping[str, Any]) -> bool:
    """Whether a row has a prompt, a list of answers to it, and something to order them by."""
    column = next((name for name in ANSWERS if isinstance(row.get(name), list)), None)
    if column is None or _prompt_column(row) is None:
        return False
    orders = (*PLACES, *SCORES)
    own = all(isinstance(answer, dict) and any(key in answer for key in orders) for answer in row[column])
    return any(name in row for name in orders) or (own and len(row[column]) > 0)


def fits_judged(row: Mapping[str, Any]) -> bool:
    """Whether a row has a prompt, one answer, and whether that is wanted."""
    return "prompt" in row and "completion" in row and row.get("label") in (True, False)


def read_pair(row: Mapping[str, Any]) -> Preference:
    """prompt, chosen, rejected: answers alone, or whole conversations that repeat the prompt."""
    prompt = _prompt(row)
    (asked, chosen), (asked_too, rejected) = (
        _apart(_said(row[column], row), column, prompt) for column in ("chosen", "rejected")
    )
    if asked != asked_too:
        raise ValueError("`chosen` and `rejected` repeat the prompt in different ways: leave it out of both")
    return Preference(asked, (chosen, rejected), _pair_ranks(row), _margin(row), tools_of(row))


def read_whole_pair(row: Mapping[str, Any]) -> Preference:
    """chosen and rejected as whole conversations; what they begin with in common is the prompt."""
    both = [_whole(row[column], column) for column in ("chosen", "rejected")]
    most = min(map(len, both)) - 1  # the last turn of either is (part of) its answer, even if both have the same
    shared = 0
    while shared < most and both[0][shared] == both[1][shared]:
        shared += 1
    answers = both[0][shared:], both[1][shared:]
    return Preference(both[0][:shared], answers, _pair_ranks(row), _margin(row), tools_of(row))


def read_ranked(row: Mapping[str, Any]) -> Preference:
    """prompt and several answers, ordered by ranks (1 is the best) or scores (the highest is); equal ones tie."""
    column = next(name for name in ANSWERS if isinstance(row.get(name), list))
    prompt, listed = _prompt(row), row[column]
    read = [_apart(_said(answer, row), f"{column}[{number}]", prompt) for number, answer in enumerate(listed)]
    if any(asked != read[0][0] for asked, _ in read):
        raise ValueError(f"`{column}` repeat the prompt in different ways: leave it out of them")
    asked = read[0][0] if read else prompt
    return Preference(asked, tuple(answer for _, answer in read), _ranks(row, column), _margin(row), tools_of(row))


def read_judged(row: Mapping[str, Any]) -> Judged:
    """prompt, completion, label: true for an answer that is wanted."""
    asked, answer = _apart(_said(row["completion"], row), "completion", _prompt(row))
    return Judged(asked, answer, bool(row["label"]), tools_of(row))


def _has_pair(row: Mapping[str, Any]) -> bool:
    return "chosen" in row and "rejected" in row


def _prompt_column(row: Mapping[str, Any]) -> str | None:
    return next((name for name in PROMPTS if name in row), None)


def _prompt(row: Mapping[str, Any]) -> Turns:
    """The turns before the answers; a text is the user's, or a dialogue that ends where the assistant is to speak."""
    column = _prompt_column(row)
    assert column is not None
    turns = conversation_of(row[column], column) if row[column] is not None else None
    if turns is None:
        parts = [text_of(row, column)]
        if column == "instruction" and row.get("input") is not None:
            parts.append(text_of(row, "input"))
        turns = (Message("user", "\n\n".join(part for part in parts if part.strip())),)
    if isinstance(row[column], str) and turns[-1] == Message("assistant", ""):
        turns = turns[:-1]
    system = (Message("system", text_of(row, "system")),) if row.get("system") else ()
    return system + turns


def _whole(value: Any, column: str) -> Turns:
    turns = conversation_of(value, column)
    if turns is None:
        raise ValueError(
            f"`{column}` is text in a row without a prompt: write a `prompt` column, a list of messages, "
            'or a dialogue that begins with "\\n\\nHuman: "'
        )
    return turns


def _apart(value: Any, column: str, prompt: Turns) -> tuple[Turns, Turns]:
    """The prompt and the answer in a value that holds the answer, or the whole conversation."""
    if value is None:
        return prompt, ()
    turns = conversation_of(value, column)
    if turns is None:
        return prompt, (Message("assistant", value),)
    for system in (0, 1):  # some layouts put a system turn before the prompt that they repeat
        end = system + len(prompt)
        if all(turn.role == "system" for turn in turns[:system]) and _same(turns[system:end], prompt):
            return turns[:end], turns[end:]
    if not turns or turns[0].role in ("assistant", "tool") or prompt[-1].role == "assistant":
        return prompt, turns
    raise ValueError(
        f"`{column}` begins with a {turns[0].role} turn that is not the prompt: repeat the prompt as it is, or leave "
        "it out"
    )


def _same(turns: Turns, prompt: Turns) -> bool:
    """Whether the turns are those of the prompt, but for spaces around them."""
    said, asked = ([(turn.role, turn.content.strip()) for turn in part] for part in (turns, prompt))
    return len(prompt) > 0 and said == asked


def _said(answer: Any, row: Mapping[str, Any]) -> Any:
    """An answer as it was said: without the object around it that also has its rank or score, and, where the prompt is
    a dialogue that is one text, without the spaces that the dialogue puts around it."""
    if isinstance(answer, dict) and not {"role", "from"} & answer.keys():
        key = next((key for key in TEXTS if key in answer), None)
        if key is None:
            raise ValueError(f"an answer has none of {', '.join(TEXTS)}, only {', '.join(answer)}")
        answer = answer[key]
    asked = row[_prompt_column(row) or ""]
    return answer.strip() if isinstance(answer, str) and isinstance(asked, str) and dialogue_of(asked) else answer


def _ranks(row: Mapping[str, Any], answers: str) -> tuple[int, ...]:
    """The place of each answer, from a column beside the answers or a key in each of them."""
    named = [name for name in (*PLACES, *SCORES) if name in row]
    name = named[0] if named else next(key for key in (*PLACES, *SCORES) if key in row[answers][0])
    values = row[name] if named else [answer.get(name) for answer in row[answers]]
    if len(named) > 1:
        raise ValueError(f"`{named[0]}` and `{named[1]}` both order the answers: keep one of them")
    if not isinstance(values, list):
        raise ValueError(f"`{name}` should be a list of numbers, not {kind_of(values)}")
    if len(values) != len(row[answers]):
        raise ValueError(f"`{name}` has {len(values)} entries for {len(row[answers])} `{answers}`")
    numbers = [_number(value, name) for value in values]
    return places(numbers if name in PLACES else [-number for number in numbers])


def places(numbers: Sequence[float]) -> tuple[int, ...]:
    """The place of each number among the different ones, 0 for the lowest."""
    order = {number: place for place, number in enumerate(sorted(set(numbers)))}
    return tuple(order[number] for number in numbers)


def _pair_ranks(row: Mapping[str, Any]) -> tuple[int, int]:
    """(0, 1): the chosen answer is better; a tie where both have scores and these are equal."""
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    if any(score is None for score in scores):
        return 0, 1
    chosen, rejected = _number(scores[0], "score_chosen"), _number(scores[1], "score_rejected")
    if chosen < rejected:
        raise ValueError(
            f"`score_chosen` is {chosen:g} and `score_rejected` is {rejected:g}, more: swap the answers, or leave the "
            "scores out"
        )
    return (0, 0) if chosen == rejected else (0, 1)


def _margin(row: Mapping[str, Any]) -> float:
    margin = row.get("margin")
    number = 0.0 if margin is None else _number(margin, "margin")
    if number < 0:
        raise ValueError(f"`margin` should be a number of at least 0, not {number:g}")
    return number


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"`{column}` should hold numbers, not {value if isinstance(value, float) else kind_of(value)}")
    return float(value)
