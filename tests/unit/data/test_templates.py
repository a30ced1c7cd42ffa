from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from burnish.data.chat import prompt_ids
from burnish.data.templates import NAMED_TEMPLATES, ChatTemplate, RefusedConversation
from burnish.data.tokenizer import Tokenizer
from burnish.data.turns import messages_of
from tests.tiny import tiny_tokenizer
from tests.unit.data.families import ALL, TOOLS, chat_tokenizer

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "What is 3 plus 4?"}, {"role": "assistant", "content": " 7 <b>&amp; é\n"}],
    "several": [
        {"role": "user", "content": "The cat\n\nsat"},
        {"role": "assistant", "content": "on the mat."},
        {"role": "user", "content": "日本 🙂"},
        {"role": "assistant", "content": "{{ not a template }} {% raw %}"},
    ],
    "system": [
        {"role": "system", "content": "You are a helpful assistant. "},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ],
}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "What is <3> & 4?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "add", "arguments": {"z": "é<&>", "a": [3, 4.5, None]}},
            }
        ],
    },
    {"role": "tool", "content": '{"sum": 7}', "name": "add", "tool_call_id": "1"},
    {"role": "assistant", "content": "7"},
]
SCHEMAS = [{"type": "function", "function": {"name": "add", "description": "Adds <ü>", "parameters": {"b": 1, "a": 2}}}]


def theirs(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ALL)
def test_renders_are_those_of_transformers(tmp_path: Path, name: str, conversation: str):
    folder = chat_tokenizer(tmp_path, ALL[name])
    tokenizer, oracle = Tokenizer.load(folder), theirs(folder)
    template = ChatTemplate.open("auto", tokenizer)
    turns = CONVERSATIONS[conversation]
    if name == "gemma" and conversation == "system":
        with pytest.raises(RefusedConversation, match="System role not supported"):
            template.render(messages_of(turns, "messages"))
        return
    for generating, part in ((False, turns), (True, turns[:-1])):
        expected = oracle.apply_chat_template(part, tokenize=False, add_generation_prompt=generating)
        assert template.render(messages_of(part, "messages"), (), generating) == expected
    ids = oracle.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt_ids(messages_of(turns[:-1], "messages"), tokenizer, template) == ids


def test_tools_and_their_json_are_rendered_as_by_transformers(tmp_path: Path):
    folder = chat_tokenizer(tmp_path, TOOLS)
    template = ChatTemplate.open("auto", Tokenizer.load(folder))
    expected = theirs(folder).apply_chat_template(CALLS, tools=SCHEMAS, tokenize=False)
    assert template.render(messages_of(CALLS, "messages"), SCHEMAS) == expected
    assert '"z": "é<&>", "a": [3, 4.5, null]' in expected


def test_the_tool_template_writes_conversations_with_tools_only(tmp_path: Path):
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    marked = "{{ tools | tojson }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    listed = [{"name": "default", "template": plain}, {"name": "tool_use", "template": marked}]
    tokenizer = Tokenizer.load(chat_tokenizer(tmp_path, None, chat_template=listed))
    template, oracle = ChatTemplate.open("auto", tokenizer), theirs(tmp_path)
    turns = CONVERSATIONS["one turn"]
    messages = messages_of(turns, "messages")
    texts = [template.render(messages, tools) for tools in ((), SCHEMAS)]
    assert texts == [oracle.apply_chat_template(turns, tools=tools, tokenize=False) for tools in (None, SCHEMAS)]
    assert template.generation_spans(messages) == []
    spans = template.generation_spans(messages, SCHEMAS)
    assert [texts[1][start:end] for start, end in spans] == [turn["content"] for turn in turns]
    assert template.fingerprint != ChatTemplate(plain, tokenizer).fingerprint
    (tmp_path / "mine.jinja").write_text("mine")
    assert ChatTemplate.open(str(tmp_path / "mine.jinja"), tokenizer).render(messages, SCHEMAS) == "mine"


BARE = {
    "is none": (
        "{% for m in messages %}{{ m.role }}:{% if m.content is none %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}",
        'user:What is <3> & 4?;assistant:add;tool:{"sum": 7};assistant:7;',
    ),
    "joins": (
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %};{% endfor %}",
        'user:What is <3> & 4?;assistant:add;tool:{"sum": 7};assistant:7;',
    ),
    "prints": (
        "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.a[2] }}"
        "{% endif %};{% endfor %}",
        'What is <3> & 4?;None;{"sum": 7};7;',
    ),
}
"""Templates that want None for the content of a bare call, fail on it, and spell it out."""


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("name", BARE)
def test_a_call_without_content_is_written(tmp_path: Path, name: str, content: str | None):
    source, expected = BARE[name]
    template = ChatTemplate(source, Tokenizer.load(chat_tokenizer(tmp_path, None)))
    assert template.render(messages_of([CALLS[0], CALLS[1] | {"content": content}, *CALLS[2:]], "messages")) == expected


def test_a_template_that_fails_or_declines_a_bare_call_says_so(tmp_path: Path):
    tokenizer, messages = Tokenizer.load(chat_tokenizer(tmp_path, None)), messages_of(CALLS, "messages")
    with pytest.raises(ValueError, match="fails: UndefinedError"):
        ChatTemplate("{{ messages[1].content + nothing.here }}", tokenizer).render(messages)
    with pytest.raises(RefusedConversation, match="no calls"):
        ChatTemplate("{% if messages[1].tool_calls %}{{ raise_exception('no calls') }}{% endif %}", tokenizer).render(
            messages
        )


def test_functions_that_templates_may_call(tmp_path: Path):
    tokenizer = Tokenizer.load(chat_tokenizer(tmp_path, None))

    def render(source: str) -> str:
        return ChatTemplate(source, tokenizer).render(messages_of(CONVERSATIONS["one turn"], "messages"))

    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ [1, 2] | tojson(indent=1) }}") == "[\n 1,\n 2\n]"
    assert render("{% for k in range(9) %}{% if k == 2 %}{% break %}{% endif %}{{ k }}{% endfor %}") == "01"
    assert render("{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert render("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}") == "<s>|</s>|"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ range(10000000) | list }}",
        "{% include '/etc/passwd' %}",
        "{{ messages[9].content.strip() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox_or_fail_unnamed(tmp_path: Path, source: str):
    template = ChatTemplate(source, Tokenizer.load(chat_tokenizer(tmp_path, None)), "mine")
    messages = messages_of(CONVERSATIONS["one turn"], "messages")
    with pytest.raises(ValueError, match=r"the chat template \(mine\) fails: \w+: "):
        template.render(messages)


def test_an_error_in_a_template_is_an_error_with_its_line(tmp_path: Path):
    tokenizer = Tokenizer.load(chat_tokenizer(tmp_path, None))
    with pytest.raises(ValueError, match="error at line 2"):
        ChatTemplate("fine\n{% for %}", tokenizer)


def test_generation_marks_are_found_and_not_printed(tmp_path: Path):
    tokenizer = Tokenizer.load(chat_tokenizer(tmp_path, ALL["chatml"]))
    template = ChatTemplate.open("auto", tokenizer)
    messages = messages_of(CONVERSATIONS["several"], "messages")
    text = template.render(messages)
    spans = [text[start:end] for start, end in template.generation_spans(messages)]
    assert spans == ["on the mat.<|im_end|>", "{{ not a template }} {% raw %}<|im_end|>"]
    assert ChatTemplate("{{ messages }}", tokenizer).generation_spans(messages) == []


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_named_templates_print_what_they_are_known_for(tmp_path: Path, name: str):
    template = ChatTemplate.open(name, Tokenizer.load(chat_tokenizer(tmp_path, None)))
    text = template.render(messages_of(CONVERSATIONS["one turn"], "messages"))
    expected = {
        "chatml": "<s><|im_start|>user\nWhat is 3 plus 4?<|im_end|>\n"
        "<|im_start|>assistant\n 7 <b>&amp; é\n<|im_end|>\n",
        "alpaca": "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nWhat is 3 plus 4?\n\n### Response:\n 7 <b>&amp; é\n</s>\n\n",
        "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. "
        "USER: What is 3 plus 4? ASSISTANT:  7 <b>&amp; é\n</s>",
    }
    assert text == expected[name]


def test_what_model_template_may_be(tmp_path: Path):
    tokenizer = Tokenizer.load(chat_tokenizer(tmp_path / "t", None))
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    messages = messages_of(CONVERSATIONS["one turn"], "messages")
    assert ChatTemplate.open(str(tmp_path / "mine.jinja"), tokenizer).render(messages) == "What is 3 plus 4?"
    with pytest.raises(ValueError, match="chatlm is not known; write one of auto, chatml, alpaca, vicuna"):
        ChatTemplate.open("chatlm", tokenizer)
    with pytest.raises(ValueError, match=r"none\.jinja cannot be read: No such file"):
        ChatTemplate.open(str(tmp_path / "none.jinja"), tokenizer)
    with pytest.raises(ValueError, match=r"ships no chat template: write model\.template=chatml\|alpaca\|vicuna"):
        ChatTemplate.open("auto", tokenizer).render(messages)


def test_chatml_needs_its_tokens(tmp_path: Path):
    folder = tiny_tokenizer(tmp_path)
    content = (folder / "tokenizer.json").read_text().replace("<|im_end|>", "<|other|>")
    (folder / "tokenizer.json").write_text(content)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|other|>"}')
    with pytest.raises(ValueError, match=r"<\|im_end\|> are no tokens .* write model.template=alpaca or vicuna"):
        ChatTemplate.open("chatml", Tokenizer.load(folder))
