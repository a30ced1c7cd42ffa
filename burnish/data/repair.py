"""Known dirt in conversations, and what is done about each kind: named rules, so that every change can be counted.

Imports no torch.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from typing import Any, Generic, TypeVar, cast

from burnish.types import Example, Message, Text

R = TypeVar("R")

REPAIRS = {
    "broken_unicode": "halves of surrogate pairs, which no tokenizer can read, became U+FFFD",
    "html_residue": "HTML of a web export became plain text and Markdown (code blocks as they are, entities decoded)",
    "empty_turn": "turns without text were left out",
    "leading_assistant": "assistant and tool turns before the first user turn were left out",
    "repeated_role": "neighbouring turns of one role were joined with a blank line",
    "trailing_user": "turns after the last response were left out",
}
"""What each rule does to a row."""

DROPS = {
    "empty_response": "the last response is empty",
    "empty_text": "there is no text",
    "no_prompt": "no user turn comes before a response",
    "no_response": "there is no response",
    "mixed_weights": "neighbouring assistant turns have different weights and cannot be joined",
}
"""Why a row cannot be repaired, and is dropped."""


@dataclass(frozen=True, slots=True)
class Repaired(Generic[R]):
    """What became of a row: the clean reading, or None with the reason; and the rules that changed it."""

    example: R | None
    rules: tuple[str, ...] = ()
    dropped: str | None = None


def repair(example: Example | Text, exported: bool = False) -> Repaired[Example | Text]:
    """The row after every rule that applies to it. `exported` is for rows of web exports, which may carry HTML."""
    if isinstance(example, Text):
        return _repair_text(example)
    rules: list[str] = []
    whole = Example(
        tuple(replace(m, content=whole_unicode(m.content), extra=_whole(m.extra)) for m in example.messages),
        _whole(example.tools),
    )
    if whole != example:
        rules.append("broken_unicode")
    messages = list(whole.messages)
    if exported:
        cleaned = [replace(message, content=plain_text(message.content)) for message in messages]
        if cleaned != messages:
            rules.append("html_residue")
            messages = cleaned
    messages, dropped = _repair_turns(messages, rules)
    if dropped:
        return Repaired(None, tuple(rules), dropped)
    return Repaired(replace(whole, messages=tuple(messages)), tuple(rules))


def whole_unicode(text: str) -> str:
    """The text with every half of a surrogate pair replaced by U+FFFD."""
    return re.sub(r"[\ud800-\udfff]", "\ufffd", text) if not text.isascii() else text


def _whole(value: Any) -> Any:
    """The same for every text within a value as JSON has them, keys too: tool calls, schemas, reasoning."""
    if isinstance(value, str):
        return whole_unicode(value)
    if isinstance(value, Mapping):
        return {_whole(key): _whole(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        items = [_whole(item) for item in cast("Sequence[Any]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def plain_text(text: str) -> str:
    """A message of a web export without its HTML.

    A message that is HTML from its first tag to its last becomes Markdown: paragraphs, breaks, lists, headings,
    emphasis, code. In any other message only entities are decoded, and only if it does not talk about HTML or XML
    itself. Fenced and inline code stays as it is.
    """
    stripped = text.strip()
    if _DOCUMENT.match(stripped) and stripped.endswith(">"):
        parser = _Markdown()
        parser.feed(stripped)
        parser.close()
        return parser.text()
    if "&" not in text or _ABOUT_MARKUP.search(text):
        return text
    pieces = _CODE.split(text)
    return "".join(piece if number % 2 else _decode(piece) for number, piece in enumerate(pieces))


def _repair_text(text: Text) -> Repaired[Example | Text]:
    pieces = tuple((whole_unicode(piece), trained) for piece, trained in text.pieces)
    rules = ("broken_unicode",) if pieces != text.pieces else ()
    if not any(piece.strip() for piece, trained in pieces if trained):
        return Repaired(None, rules, "empty_response" if len(pieces) > 1 else "empty_text")
    return Repaired(Text(pieces), rules)


def _repair_turns(messages: list[Message], rules: list[str]) -> tuple[list[Message], str | None]:
    """The turns in an order that a template can write, or the reason why there is none. Appends the rules it used."""
    last = next((k for k in range(len(messages) - 1, -1, -1) if messages[k].role == "assistant"), None)
    if last is None:
        return messages, "no_response"
    if is_empty(messages[last]):
        return messages, "empty_response"
    steps = (("trailing_user", messages[: last + 1]), ("empty_turn", None), ("leading_assistant", None))
    for rule, given in steps:
        kept = given if given is not None else (_without_empty if rule == "empty_turn" else _from_user)(messages)
        if len(kept) < len(messages):
            rules.append(rule)
        messages = kept
    if not any(message.role == "user" for message in messages):
        return messages, "no_prompt"
    joined = _join(messages)
    if joined is None:
        return messages, "mixed_weights"
    if len(joined) < len(messages):
        rules.append("repeated_role")
    return joined, None


def is_empty(message: Message) -> bool:
    """Whether a turn says nothing, and calls no tool either."""
    return not message.content.strip() and not message.extra.get("tool_calls")


def _without_empty(messages: list[Message]) -> list[Message]:
    """The turns that say something; a tool may answer with nothing."""
    return [message for message in messages if message.role == "tool" or not is_empty(message)]


def _from_user(messages: list[Message]) -> list[Message]:
    first = next((k for k, message in enumerate(messages) if message.role == "user"), len(messages))
    return [message for message in messages[:first] if message.role == "system"] + messages[first:]


def _join(messages: Sequence[Message]) -> list[Message] | None:
    """Neighbours of one role as one turn; tool results and tool calls stay apart. None when their weights differ."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        calls = message.extra.get("tool_calls") or (before and before.extra.get("tool_calls"))
        if before is None or before.role != message.role or message.role == "tool" or calls:
            joined.append(message)
        elif before.weight != message.weight:
            return None
        else:
            joined[-1] = replace(before, content=f"{before.content}\n\n{message.content}")
    return joined


class _Markdown(HTMLParser):
    """Writes the Markdown of what it is fed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._out: list[str] = []
        self._lists: list[int | None] = []
        self._code = 0
        self._silent = 0
        self._label: str | None = None
        """What a code block says before its code: its language, unless no `<code>` follows."""

    def text(self) -> str:
        """What was written, without the blank lines that markup leaves."""
        lines = "".join(self._out).strip().split("\n")
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines))
        return re.sub(rf"{_CODE_LINE}?\n```", "\n```", text).replace(_CODE_LINE, "\n")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a tag."""
        if tag in _SILENT:
            self._silent += 1
        elif tag == "pre":
            self._code += 1
            self._out.append("\n\n```")
            self._label = ""
        elif tag == "code":
            self._out.append("`" if not self._code else self._opened(self._label))
        elif self._code:
            return
        elif tag in ("ul", "ol"):
            self._lists.append(0 if tag == "ol" else None)
            self._out.append("\n")
        elif tag == "li":
            self._out.append("\n" + self._bullet())
        else:
            self._out.append(_OPENING.get(tag, ""))

    def handle_endtag(self, tag: str) -> None:
        """Close a tag."""
        if tag in _SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag == "pre":
            self._code = max(0, self._code - 1)
            code = "" if self._label is None else _CODE_LINE + self._label.strip("\n").replace("\n", _CODE_LINE)
            self._out.append(f"{code}\n```\n\n")
            self._label = None
        elif tag == "code":
            self._out.append("" if self._code else "`")
        elif self._code:
            return
        elif tag in ("ul", "ol"):
            if self._lists:
                self._lists.pop()
            self._out.append("\n")
        else:
            self._out.append(_CLOSING.get(tag, ""))

    def handle_data(self, data: str) -> None:
        """Text between tags: as it is in code, with single spaces elsewhere."""
        if self._silent:
            return
        if self._code and self._label is not None:
            self._label += data
        else:
            self._out.append(data.replace("\n", _CODE_LINE) if self._code else re.sub(r"\s+", " ", data))

    def _opened(self, label: str | None) -> str:
        """The end of the line that opens a code block, with the language before it."""
        self._label = None
        return f"{label.strip()}\n" if label is not None else ""

    def _bullet(self) -> str:
        depth = "  " * max(0, len(self._lists) - 1)
        count = self._lists[-1] if self._lists else None
        if count is None:
            return f"{depth}- "
        self._lists[-1] = count + 1
        return f"{depth}{count + 1}. "


def _decode(text: str) -> str:
    return _ENTITY.sub(lambda found: html.unescape(found.group()).replace("\xa0", " "), text)


_DOCUMENT = re.compile(r"<(div|p|ul|ol|h[1-6]|pre|table|blockquote)(\s[^<>]*)?>", re.IGNORECASE)
_ABOUT_MARKUP = re.compile(r"\b(x?html|xml|entit(y|ies)|escap(e|ed|ing)|markup)\b", re.IGNORECASE)
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
_ENTITY = re.compile(r"&(lt|gt|amp|quot|apos|nbsp|#39|#x27|#34|#x22);", re.IGNORECASE)
_CODE_LINE = "\ue1fd"
"""A line break in code until the end, so that what tidies the text around it leaves the code as it is."""
_SILENT = ("button", "script", "style", "svg")
"""Tags whose text was never part of the message ("Copy code")."""
_OPENING = {f"h{level}": "\n\n" + "#" * level + " " for level in range(1, 7)} | {
    "p": "\n\n",
    "div": "\n\n",
    "blockquote": "\n\n> ",
    "br": "\n",
    "tr": "\n",
    "strong": "**",
    "b": "**",
    "em": "*",
    "i": "*",
}
_CLOSING = {f"h{level}": "\n\n" for level in range(1, 7)} | {
    "p": "\n\n",
    "div": "\n\n",
    "td": " ",
    "th": " ",
    "strong": "**",
    "b": "**",
    "em": "*",
    "i": "*",
}
