"""Chat templates: Jinja in a sandbox, with the functions and whitespace rules that transformers gives them.

Imports no torch.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from burnish.data.tokenizer import Tokenizer
from burnish.types import Message

OPEN, CLOSE = "\ue100\ue1fe", "\ue1fe\ue100"
"""Private-use characters that mark a generation block while its place is looked for; no text has them in this order."""


class RefusedConversation(ValueError):
    """The template declined a conversation (`raise_exception`): it takes no system turn, say."""


class ChatTemplate:
    """A chat template bound to the special tokens of a tokenizer."""

    def __init__(
        self,
        source: str | None,
        tokenizer: Tokenizer,
        name: str = "the tokenizer's own",
        tool_source: str | None = None,
    ) -> None:
        self.source = source
        """The Jinja text; None when the tokenizer ships none: an error only once a conversation is to be written."""
        self.tool_source = tool_source
        """What takes its place in conversations with tools, if anything does."""
        self.name = name
        sources = (source or "") if tool_source is None else json.dumps([source, tool_source])
        self.fingerprint = hashlib.sha256(sources.encode()).hexdigest()[:32]
        self._tokenizer = tokenizer
        self._own = _compiled(source, name)
        self._with_tools = self._own if tool_source is None else _compiled(tool_source, f"{name}, tool_use")

    @classmethod
    def open(cls, setting: str, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template that `model.template` asks for: `auto`, a name, or a .jinja file.

        Raises ValueError for an unknown name, a missing file, or a template whose marks this tokenizer does not have.
        """
        if setting == "auto":
            return cls(tokenizer.chat_template, tokenizer, tool_source=tokenizer.tool_template)
        if setting in NAMED_TEMPLATES:
            return cls(_named_source(setting, tokenizer), tokenizer, setting)
        path = Path(setting)
        if path.suffix != ".jinja":
            raise ValueError(
                f"model.template={setting} is not known; write one of auto, {', '.join(NAMED_TEMPLATES)}, or FILE.jinja"
            )
        try:
            return cls(path.read_text(encoding="utf-8"), tokenizer, setting)
        except OSError as error:
            raise ValueError(f"model.template={setting} cannot be read: {error.strerror or error}") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text, special tokens included.

        Raises RefusedConversation when the template declines it, ValueError when there is no template or it fails.
        """
        return self._run(False, messages, tools, add_generation_prompt)

    def missing(self) -> str:
        """What to tell a user whose conversations need a template that the tokenizer does not ship."""
        return (
            f"the tokenizer in {self._tokenizer.folder} ships no chat template: write model.template="
            f"{'|'.join(NAMED_TEMPLATES)} or model.template=FILE.jinja"
        )

    def generation_spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[tuple[int, int]]:
        """Where in the rendered text the template's own `{% generation %}` blocks stand; empty when it has none."""
        source = self.tool_source if tools and self.tool_source is not None else self.source
        if source is None or "generation" not in source:
            return []
        text = self._run(True, messages, tools, False)
        return list(_spans(text))

    def _run(
        self,
        marked: bool,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
    ) -> str:
        both = self._with_tools if tools else self._own
        if both is None:
            raise ValueError(self.missing())
        compiled = both[marked]

        def written(nothing: str | None) -> str:
            return compiled.render(
                messages=[_as_seen(message, nothing) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special,
            )

        try:
            return _with_bare_calls(written) if any(map(_is_bare_call, messages)) else written("")
        except _Declined as declined:
            raise RefusedConversation(str(declined)) from None
        except Exception as error:  # a template is a program, and may fail in any way a program can
            raise ValueError(f"the chat template ({self.name}) fails: {type(error).__name__}: {error}") from None


def _is_bare_call(message: Message) -> bool:
    return not message.content and bool(message.extra.get("tool_calls"))


def _as_seen(message: Message, nothing: str | None) -> dict[str, Any]:
    """A message as templates see it, with `nothing` for the content of one that only calls tools."""
    content = nothing if _is_bare_call(message) else message.content
    return {"role": message.role, "content": content, **message.extra}


def _with_bare_calls(written: Callable[[str | None], str]) -> str:
    """The render with None for the content of bare calls, as the data has it, or with "" where None does not do.

    Some templates write a call only if `message.content is none`; others cannot join None to text, or spell it out.
    """
    try:
        text = written(None)
    except _Declined:
        raise
    except Exception:  # if "" fails too, that is the failure to report
        return written("")
    if "None" not in text:
        return text
    try:
        empty = written("")
    except Exception:
        return text
    return text if text.count("None") <= empty.count("None") else empty


class _Declined(jinja2.TemplateError):
    """What `raise_exception` raises."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` prints its body, between marks if the environment asks for them."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Any) -> str:
        body: str = caller()
        return f"{OPEN}{body}{CLOSE}" if self.environment.globals["generation_marks"] else body


def _compiled(source: str | None, name: str) -> tuple[jinja2.Template, jinja2.Template] | None:
    """A template that prints as it should, and one that marks its generation blocks."""
    if source is None:
        return None
    try:
        return _environment(False).from_string(source), _environment(True).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template ({name}) has an error at line {error.lineno}: {error.message}") from None


def _environment(marked: bool) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    known: dict[str, Any] = {"raise_exception": _decline, "strftime_now": _now, "generation_marks": marked}
    for name, value in known.items():
        environment.globals[name] = value
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands: Jinja's own filter would escape <, > and & for HTML and sort the keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _decline(message: str) -> None:
    raise _Declined(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """From and to of each marked block, counted in the text without its marks."""
    place, start = 0, 0
    while (found := text.find(OPEN, place)) >= 0:
        before = start + found - place
        end = text.index(CLOSE, found)
        start = before + end - found - len(OPEN)
        yield before, start
        place = end + len(CLOSE)


def _named_source(name: str, tokenizer: Tokenizer) -> str:
    source = NAMED_TEMPLATES[name]
    if name == "chatml":
        missing = [mark for mark in ("<|im_start|>", "<|im_end|>") if tokenizer.id_of(mark) is None]
        if missing:
            raise ValueError(
                f"model.template=chatml: {' and '.join(missing)} are no tokens of the tokenizer in {tokenizer.folder}; "
                "write model.template=alpaca or vicuna, which need no tokens of their own"
            )
    elif tokenizer.eos_id is None:
        raise ValueError(
            f"model.template={name} ends responses with eos_token, which the tokenizer in {tokenizer.folder} has not"
        )
    return ("{{ bos_token }}" if tokenizer.adds_bos else "") + source


NAMED_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% if messages[0].role != 'system' %}{{ 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\\n\\n' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
        "{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}"
        "{% elif message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}"
        "{% else %}{{ raise_exception('the alpaca template has no tool turns') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "vicuna": (
        "{% if messages[0].role != 'system' %}"
        "{{ 'A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content + ' ' }}"
        "{% elif message.role == 'user' %}{{ 'USER: ' + message.content }}"
        "{% elif message.role == 'assistant' %}{{ ' ASSISTANT: ' + message.content + eos_token }}"
        "{% else %}{{ raise_exception('the vicuna template has no tool turns') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
}
"""Templates by name, for tokenizers that ship none; {{ bos_token }} goes in front where the tokenizer adds one."""
