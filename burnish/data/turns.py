"""Turns of a conversation as the formats spell them, read into messages. Imports no torch."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.data.files import kind_of
from burnish.types import Message, Role

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""What the roles are called in the wild, in lower case."""

SPOKEN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
"""What begins a turn in Anthropic's dialogues, which are one text each: `\\n\\nHuman: ... \\n\\nAssistant: ...`."""

PASSED = ("tool_calls", "name", "tool_call_id", "reasoning_content", "thinking")
"""The keys of a message that go on to the chat template."""


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column; nothing (null) is an empty text. Raises ValueError when it holds something else."""
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"`{column}` should be text, not {kind_of(value)}")
    return value


def messages_of(turns: Any, column: str) -> tuple[Message, ...]:
    """Messages from a list of {role, content, ...}, the way OpenAI writes them.

    Raises ValueError for an unknown role, a content that is not text, or a weight below 0.
    """
    if not isinstance(turns, list):
        raise ValueError(f"`{column}` should be a list of messages, not {kind_of(turns)}")
    return tuple(_message(turn, f"`{column}` turn {number}") for number, turn in enumerate(turns))


def sharegpt_messages(turns: Sequence[Any], column: str = "conversations") -> tuple[Message, ...]:
    """Messages from a list of {from, value}. A `function_call` turn becomes an assistant's turn with that tool call."""
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        place = f"`{column}` turn {number}"
        if "value" not in turn:
            raise ValueError(f"{place} has no `value`, only {', '.join(turn)}")
        role = role_of(turn["from"], place)
        content = _content(turn["value"], place)
        weight = _weight(turn, place)
        if str(turn["from"]).strip().lower() == "function_call":
            messages.append(Message(role, "", weight, {"tool_calls": _called(content, place)}))
        else:
            messages.append(Message(role, content, weight))
    return tuple(messages)


def conversation_of(value: Any, column: str) -> tuple[Message, ...] | None:
    """The turns of a value that holds turns: a list of messages (or one of them), or a dialogue that is one text.

    None for any other text. Raises ValueError for a value that is neither, and for a turn that cannot be read.
    """
    if isinstance(value, str):
        return dialogue_of(value)
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return sharegpt_messages(turns, column)
    if not isinstance(turns, list):
        raise ValueError(f"`{column}` should be text or a list of messages, not {kind_of(value)}")
    return messages_of(turns, column)


def dialogue_of(text: str) -> tuple[Message, ...] | None:
    """The turns of a dialogue as Anthropic writes it; None for a text that does not begin with `Human:`."""
    if not re.match(r"\s*Human:", text):
        return None
    _, *parts = SPOKEN.split(text.lstrip())
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message("user" if name == "Human" else "assistant", said.strip()) for name, said in spoken)


def tools_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row's `tools` column: a list of schemas, or such a list written as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return ()
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"`tools` is text that is not JSON ({error.msg} at column {error.colno})") from None
    if tools is None:
        return ()
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"`tools` should be a list of tool schemas, not {kind_of(tools)}")
    return tuple(tools)


def role_of(name: Any, place: str) -> Role:
    """The role that a name in the data stands for. Raises ValueError for an unknown one."""
    role = ROLES.get(str(name).strip().lower())
    if role is None:
        known = ", ".join(sorted(ROLES))
        raise ValueError(f"{place} has the unknown role '{name}'; known are {known}")
    return role


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{place} should be {{role, content}}, not {kind_of(turn)}")
    if "role" not in turn:
        raise ValueError(f"{place} has no `role`, only {', '.join(turn)}")
    role = role_of(turn["role"], place)
    extra = {key: turn[key] for key in PASSED if turn.get(key) is not None}
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(extra["tool_calls"], place)
        if not extra["tool_calls"]:
            del extra["tool_calls"]
    if "content" not in turn and "tool_calls" not in extra:
        raise ValueError(f"{place} has neither `content` nor `tool_calls`")
    return Message(role, _content(turn.get("content"), place), _weight(turn, place), extra)


def _content(value: Any, place: str) -> str:
    """A message's text: a string, nothing, or a list of text parts, which are joined."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text") or "") for part in value)
    if not isinstance(value, str):
        kinds = (
            sorted({str(part.get("type")) for part in value if isinstance(part, dict)})
            if isinstance(value, list)
            else []
        )
        what = f"parts of kind {', '.join(kinds)}" if kinds else kind_of(value)
        raise ValueError(f"{place}: the content should be text, not {what}")
    return value


def _weight(turn: Mapping[str, Any], place: str) -> float | None:
    weight = turn.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ValueError(f"{place}: `weight` should be a number of at least 0, not {weight}")
    return float(weight)


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects, as chat templates expect them; OpenAI writes them as JSON text."""
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{place}: `tool_calls` should be a list of objects, not {kind_of(calls)}")
    read: list[dict[str, Any]] = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or "name" not in function:
            raise ValueError(f"{place}: a tool call needs a `function` with a `name`")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json_object(arguments, f"{place}: the `arguments` of a tool call")
        kept = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
        read.append({"type": "function", **kept, "function": {**function, "arguments": arguments}})
    return read


def _called(content: str, place: str) -> list[dict[str, Any]]:
    value = _json_object(content, f"{place}: a function call")
    return _tool_calls([{"function": value}], place)


def _json_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} should be a JSON object ({error.msg} at column {error.colno})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} should be a JSON object, not {kind_of(value)}")
    return value
