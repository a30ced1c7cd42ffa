"""The shapes that rows come in: how each is recognised, and what it is read as. Imports no torch.

A format is recognised from the columns (and what is in them), never from a registry file. To add one, write its `fits`
and `read` and list it in FORMATS at the foot of this file; the conformance suite then runs over it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from burnish.data import preference_formats as preferences
from burnish.data.files import kind_of
from burnish.data.turns import messages_of, sharegpt_messages, text_of, tools_of
from burnish.types import Example, Judged, Message, Preference, Prompt, Text

Reading = Example | Text | Prompt | Preference | Judged


@dataclass(frozen=True, slots=True)
class Format:
    """One shape of rows."""

    reading: str
    """How its columns are read, in words, for the announcement and for errors."""
    needs: str
    """What a row must have, in words."""
    columns: frozenset[str]
    """Every column it looks at."""
    fits: Callable[[Mapping[str, Any]], bool]
    """Whether a row has this shape, by its columns and what kind of thing is in them."""
    read: Callable[[Mapping[str, Any]], Reading]
    """What the row says. Raises ValueError, without the place, for a value of the wrong kind."""
    sample: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """A row of this format, for documents and tests."""
    holds: Literal["examples", "prompts", "preferences", "judged"] = "examples"
    """What its rows are for: to learn from, to be answered, or to compare answers by."""

    @property
    def compares(self) -> bool:
        """Whether its rows say which answers are wanted."""
        return self.holds in ("preferences", "judged")


def recognise(rows: Sequence[Mapping[str, Any]], origins: Sequence[str] = ()) -> str:
    """The name of the one format that all these rows have.

    Raises ValueError when they fit two (showing both readings) or none (showing the columns found and the known
    formats), or when some row fits no format that the first one fits (naming that row).
    """
    assert rows
    fits = {name: [format.fits(row) for row in rows] for name, format in FORMATS.items()}
    # Answers to compare are what such rows are for, whatever else they hold: the chosen conversation once more, say.
    likely = {name: found for name, found in fits.items() if found[0] and FORMATS[name].compares}
    likely = likely or {name: found for name, found in fits.items() if found[0]}
    whole = [name for name, found in likely.items() if all(found)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        readings = "; or ".join(f"{name} ({FORMATS[name].reading})" for name in whole)
        choices = " or ".join(f"data.format={name}" for name in whole)
        raise ValueError(f"the rows read two ways: {readings}; write {choices}")
    if not likely:
        known = "; ".join(f"{name}: {format.needs}" for name, format in FORMATS.items())
        raise ValueError(f"no known format has the columns {_columns(rows[0])}; known are {known}")
    number = max(found.index(False) for found in likely.values())
    where = origins[number] if origins else f"row {number}"
    raise ValueError(disagreement(where, next(iter(likely)), rows[number]))


def disagreement(origin: str, name: str, row: Mapping[str, Any]) -> str:
    """The error for a row of another shape than the rest, as one line."""
    needs = FORMATS[name].needs
    return f"{origin}: the data reads as {name}, which needs {needs}, but this row has the columns {_columns(row)}"


def announce(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """How the rows are read, in one line, with the columns that nobody looks at."""
    found = dict.fromkeys(key for row in rows for key in row)
    idle = [key for key in found if key not in FORMATS[name].columns]
    return f"reads as {name}: {FORMATS[name].reading}" + (f"; not used: {', '.join(idle)}" if idle else "")


def check_format(name: str) -> None:
    """Raises ValueError when there is no format of this name."""
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"data.format={name} is not known; write one of auto, {', '.join(FORMATS)}")


def belongs_elsewhere(source: str, name: str, wanted: str) -> str:
    """The error for rows of a format that a recipe has no use for: what they are, and which recipe they are for."""
    found, use = FORMATS[name].holds, USES[FORMATS[name].holds]
    found = "answers with labels" if found == "judged" else found
    return f"{source} reads as {name} ({FORMATS[name].reading}), which is {found} and not {wanted}: {use}"


def task_of(row: Mapping[str, Any]) -> str | None:
    """The family of tasks that a row names in its `task` column, if it does."""
    task = row.get("task")
    return None if task is None else str(task)


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} ({kind_of(value)})" for key, value in row.items()) or "(none)"


def _is_text(row: Mapping[str, Any], *columns: str) -> bool:
    """Whether all of these columns are there; a value of the wrong kind is left to `read`, which says so."""
    return all(column in row and not isinstance(row[column], list | dict) for column in columns)


def _turns(row: Mapping[str, Any], column: str) -> list[Any] | None:
    turns = row.get(column)
    return turns if isinstance(turns, list) else None


def _all_have(turns: list[Any] | None, key: str) -> bool:
    return turns is not None and all(isinstance(turn, dict) and key in turn for turn in turns)


def _read_alpaca(row: Mapping[str, Any]) -> Example:
    messages = [Message("system", text_of(row, "system"))] if row.get("system") else []
    for pair in row.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError(f"`history` should be a list of [question, answer] pairs, not hold {kind_of(pair)}")
        messages += [Message("user", str(pair[0])), Message("assistant", str(pair[1]))]
    parts = [text_of(row, "instruction"), text_of(row, "input") if row.get("input") is not None else ""]
    user = "\n\n".join(part for part in parts if part.strip())
    return Example((*messages, Message("user", user), Message("assistant", text_of(row, "output"))))


def _read_sharegpt(row: Mapping[str, Any]) -> Example:
    system = [Message("system", text_of(row, "system"))] if row.get("system") else []
    return Example((*system, *sharegpt_messages(row["conversations"])), tools_of(row))


def _messages_column(row: Mapping[str, Any]) -> str:
    return "messages" if "messages" in row else "conversations"


def _fits_messages(row: Mapping[str, Any]) -> bool:
    turns = _turns(row, _messages_column(row))
    return turns is not None and ("messages" in row or len(turns) > 0) and _all_have(turns, "role")


def _read_messages(row: Mapping[str, Any]) -> Example:
    column = _messages_column(row)
    return Example(messages_of(row[column], column), tools_of(row))


def _fits_lima(row: Mapping[str, Any]) -> bool:
    turns = _turns(row, "conversations")
    return turns is not None and not any(isinstance(turn, dict | list) for turn in turns)


def _read_lima(row: Mapping[str, Any]) -> Example:
    messages: list[Message] = []
    for number, turn in enumerate(row["conversations"]):
        if not isinstance(turn, str):
            raise ValueError(f"`conversations` turn {number} should be text, not {kind_of(turn)}")
        messages.append(Message("assistant" if number % 2 else "user", turn))
    return Example(tuple(messages))


def _fits_completion(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and "completion" in row


def _read_completion(row: Mapping[str, Any]) -> Example | Text:
    if not isinstance(row["prompt"], list) and not isinstance(row["completion"], list):
        return Text(((text_of(row, "prompt"), False), (text_of(row, "completion"), True)))
    if isinstance(row["prompt"], list) != isinstance(row["completion"], list):
        raise ValueError("`prompt` and `completion` should both be text, or both lists of messages")
    context = tuple(
        Message(message.role, message.content, 0.0 if message.role == "assistant" else None, message.extra)
        for message in messages_of(row["prompt"], "prompt")
    )
    return Example(context + messages_of(row["completion"], "completion"), tools_of(row))


def _fits_prompt(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and not {"completion", "chosen", "rejected"} & row.keys()


def _read_prompt(row: Mapping[str, Any]) -> Prompt:
    prompt = row["prompt"]
    messages = messages_of(prompt, "prompt") if isinstance(prompt, list) else (Message("user", text_of(row, "prompt")),)
    answer = text_of(row, "answer") if row.get("answer") is not None else None
    return Prompt(messages, answer, task_of(row), tools_of(row))


def _read_question(row: Mapping[str, Any]) -> Example:
    return Example((Message("user", text_of(row, "question")), Message("assistant", text_of(row, "answer"))))


USES = {
    "examples": "train on them with `burnish sft`; preferences have `chosen` and `rejected` columns, say",
    "prompts": "let a model answer them in reinforcement learning, or write evaluate.path=",
    "preferences": "train on them with `burnish dpo` or `burnish reward`, or name another data.format",
    "judged": "train on them with `burnish dpo loss=kto`, or name another data.format",
}
"""What rows are for, by what they hold."""

FORMATS: dict[str, Format] = {
    "alpaca": Format(
        "instruction + input -> user, output -> assistant",
        "`instruction` and `output` (text; `input`, `system` and `history` if you like)",
        frozenset({"instruction", "input", "output", "system", "history", "task"}),
        lambda row: _is_text(row, "instruction", "output"),
        _read_alpaca,
        {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    ),
    "sharegpt": Format(
        "conversations of {from, value} -> turns",
        "`conversations` (a list of {from, value})",
        frozenset({"conversations", "system", "tools", "task"}),
        lambda row: _all_have(_turns(row, "conversations"), "from"),
        _read_sharegpt,
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello to you."}]},
    ),
    "messages": Format(
        "messages of {role, content} -> turns",
        "`messages` (a list of {role, content})",
        frozenset({"messages", "conversations", "tools", "task"}),
        _fits_messages,
        _read_messages,
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you."}]},
    ),
    "lima": Format(
        "conversations of plain texts -> user and assistant in turn",
        "`conversations` (a list of texts, the user's first)",
        frozenset({"conversations", "task"}),
        _fits_lima,
        _read_lima,
        {"conversations": ["Hello", "Hello to you."]},
    ),
    "prompt_completion": Format(
        "prompt -> context, completion -> trained (texts as they stand, lists of messages with the chat template)",
        "`prompt` and `completion` (both text, or both lists of {role, content})",
        frozenset({"prompt", "completion", "tools", "task"}),
        _fits_completion,
        _read_completion,
        {"prompt": "The sky is", "completion": " blue."},
    ),
    "question_answer": Format(
        "question -> user, answer -> assistant",
        "`question` and `answer` (text)",
        frozenset({"question", "answer", "task"}),
        lambda row: _is_text(row, "question", "answer"),
        _read_question,
        {"question": "What is 3 plus 4?", "answer": "7"},
    ),
    "text": Format(
        "text as it stands, every token trained",
        "`text` (text)",
        frozenset({"text", "task"}),
        lambda row: _is_text(row, "text"),
        lambda row: Text(((text_of(row, "text"), True),)),
        {"text": "Once upon a time."},
    ),
    "prompt": Format(
        "prompt -> a question to be answered; answer, if there, is a reference",
        "`prompt` without `completion` (text or a list of {role, content}; `answer` and `task` if you like)",
        frozenset({"prompt", "answer", "task", "tools"}),
        _fits_prompt,
        _read_prompt,
        {"prompt": "What is 3 plus 4?", "answer": "7", "task": "add"},
        "prompts",
    ),
    "prompt_chosen_rejected": Format(
        "chosen is a better answer to prompt than rejected",
        "`prompt`, `chosen` and `rejected` (text or lists of messages; `margin` if you like)",
        preferences.PAIR_COLUMNS | preferences.PROMPT_COLUMNS,
        preferences.fits_pair,
        preferences.read_pair,
        {"prompt": "What is 3 plus 4?", "chosen": "7", "rejected": "8"},
        "preferences",
    ),
    "chosen_rejected": Format(
        "chosen and rejected are whole conversations; what they begin with in common is the prompt",
        "`chosen` and `rejected` without `prompt` (lists of messages, or dialogues of `Human:` and `Assistant:`)",
        preferences.PAIR_COLUMNS,
        preferences.fits_whole_pair,
        preferences.read_whole_pair,
        {"chosen": "\n\nHuman: Hello\n\nAssistant: Hi.", "rejected": "\n\nHuman: Hello\n\nAssistant: What?"},
        "preferences",
    ),
    "ranked_answers": Format(
        "answers to prompt, in the order of their ranks (1 is the best) or scores (the highest is)",
        "`prompt`, `answers` or `responses` (a list), and `ranks` or `scores` (a list of numbers)",
        frozenset({*preferences.ANSWERS, *preferences.PLACES, *preferences.SCORES, "margin", "tools", "task"})
        | preferences.PROMPT_COLUMNS,
        preferences.fits_ranked,
        preferences.read_ranked,
        {"prompt": "What is 3 plus 4?", "answers": ["8", "7", "It is 7."], "ranks": [3, 1, 2]},
        "preferences",
    ),
    "judged": Format(
        "completion is an answer to prompt, wanted where label is true",
        "`prompt`, `completion` and `label` (true or false)",
        frozenset({"completion", "label", "tools", "task"}) | preferences.PROMPT_COLUMNS,
        preferences.fits_judged,
        preferences.read_judged,
        {"prompt": "What is 3 plus 4?", "completion": "7", "label": True},
        "judged",
    ),
}
"""Every format by name, in the order in which errors list them."""
