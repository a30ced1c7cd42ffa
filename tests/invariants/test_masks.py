"""What is trained on: found by rendering, and the same as the template's own marks say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.data.answer_encoding import ComparisonEncoder
from burnish.data.audit import Tally
from burnish.data.chat import encode, encode_row, end_ids, prompt_ids
from burnish.data.reading import Source
from burnish.data.templates import ChatTemplate, RefusedConversation
from burnish.data.tokenizer import Tokenizer
from burnish.data.turns import messages_of
from burnish.settings import DataSettings
from burnish.types import Example, Message, Preference, Text
from tests.unit.data.families import (
    ALL,
    CHATML,
    MISTRAL,
    PHI_3,
    PREFIX_STABLE,
    THINKING,
    THINKING_MARKED,
    chat_tokenizer,
)

ONE: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 3 plus 4?"},
    {"role": "assistant", "content": "3 plus 4 is 7."},
]
TWO = [*ONE, {"role": "user", "content": "The cat\nsat 日本"}, {"role": "assistant", "content": "on the mat. 🙂"}]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Add 3 and 4"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 3}'}}]},
    {"role": "tool", "content": "the result is 7"},
    {"role": "assistant", "content": "It is 7."},
]
"""A call with its arguments written as JSON text, as OpenAI does."""


def example(turns: list[dict[str, Any]]) -> Example:
    return Example(messages_of(turns, "messages"))


def opened(folder: Path, source: str | None, kind: str = "bytes") -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = Tokenizer.load(chat_tokenizer(folder, source, kind))
    return tokenizer, ChatTemplate.open("auto", tokenizer)


def unmarked(source: str) -> str:
    """The template without its generation marks, which most templates in the wild do not have."""
    return re.sub(r"(\{%-? )endgeneration", r"\1endif", re.sub(r"(\{%-? )generation", r"\1if true", source))


def trained_text(turns: list[dict[str, Any]], tokenizer: Tokenizer, template: ChatTemplate, train_on: str) -> str:
    sequence = encode(example(turns), tokenizer, template, train_on, row=0)
    return tokenizer.decode([i for i, w in zip(sequence.ids, sequence.weights, strict=True) if w], keep_special=True)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", PREFIX_STABLE)
def test_masks_equal_those_of_transformers(tmp_path: Path, name: str, kind: str):
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast.from_pretrained(chat_tokenizer(tmp_path / "marked", PREFIX_STABLE[name], kind))
    tokenizer, template = opened(tmp_path / "plain", unmarked(PREFIX_STABLE[name]), kind)
    for turns in (ONE, TWO):
        sequence = encode(example(turns), tokenizer, template, "all_assistant", row=3)
        expected = oracle.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        assert list(sequence.ids) == expected["input_ids"]
        assert [int(weight) for weight in sequence.weights] == expected["assistant_masks"]
        assert sequence.row == 3
        assert sum(sequence.weights) > 0


def test_tool_calls_are_trained_and_tool_results_are_not(tmp_path: Path):
    tokenizer, template = opened(tmp_path, unmarked(PREFIX_STABLE["tools"]))
    text = trained_text(CALLS, tokenizer, template, "all_assistant")
    assert text == '<tool_call>{"name": "add", "arguments": {"a": 3}}</tool_call><|im_end|>It is 7.<|im_end|>'
    assert trained_text(CALLS, tokenizer, template, "last_assistant") == "It is 7.<|im_end|>"


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("all_assistant", "3 plus 4 is 7.<|im_end|>on the mat. 🙂<|im_end|>"),
        ("last_assistant", "on the mat. 🙂<|im_end|>"),
    ],
)
def test_train_on_chooses_the_turns(tmp_path: Path, train_on: str, expected: str):
    tokenizer, template = opened(tmp_path, unmarked(CHATML))
    assert trained_text(TWO, tokenizer, template, train_on) == expected


def test_everything_is_everything_but_the_first_token(tmp_path: Path):
    tokenizer, template = opened(tmp_path, unmarked(CHATML))
    sequence = encode(example(TWO), tokenizer, template, "everything", row=0)
    assert sequence.weights == (0.0, *[1.0] * (len(sequence.ids) - 1))


def test_a_message_has_its_own_weight(tmp_path: Path):
    tokenizer, template = opened(tmp_path, unmarked(CHATML))
    turns = [dict(turn) for turn in TWO]
    turns[1]["weight"] = 0
    assert trained_text(turns, tokenizer, template, "all_assistant") == "on the mat. 🙂<|im_end|>"
    everything = trained_text(turns, tokenizer, template, "everything")
    assert "3 plus 4 is 7." not in everything
    assert "What is 3 plus 4?" in everything
    turns[1]["weight"], turns[3]["weight"] = 0.25, 3
    sequence = encode(example(turns), tokenizer, template, "last_assistant", row=0)
    assert {weight for weight in sequence.weights if weight} == {0.25, 3.0}
    first = [i for i, weight in zip(sequence.ids, sequence.weights, strict=True) if weight == 0.25]
    assert tokenizer.decode(first, keep_special=True) == "3 plus 4 is 7.<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma", "zephyr", "tools"])
def test_the_context_of_the_last_response_is_what_generation_is_given(tmp_path: Path, name: str):
    tokenizer, template = opened(tmp_path, unmarked(PREFIX_STABLE[name]))
    sequence = encode(example(TWO), tokenizer, template, "last_assistant", row=0)
    prompt = prompt_ids(messages_of(TWO[:-1], "messages"), tokenizer, template)
    context = [i for i, weight in zip(sequence.ids, sequence.weights, strict=True) if not weight]
    assert context[: len(prompt)] == prompt


def test_a_beginning_token_stands_once(tmp_path: Path):
    for name in ("llama-3", "llama-2"):
        tokenizer, template = opened(tmp_path / name, PREFIX_STABLE[name])
        assert tokenizer.adds_bos
        ids = encode(example(ONE), tokenizer, template).ids
        assert ids[0] == tokenizer.bos_id
        assert ids.count(tokenizer.bos_id) == 1


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_place(tmp_path: Path):
    tokenizer, template = opened(tmp_path, THINKING)
    with pytest.raises(ValueError, match=r"turn 1 cannot be found.*<think>.*data\.train_on=last_assistant") as caught:
        encode(example(TWO), tokenizer, template, "all_assistant", row=0)
    assert "\n" not in str(caught.value)
    # One response, or the last alone, needs no prefix that the template would rewrite.
    for turns, answer in ((ONE, "3 plus 4 is 7."), (TWO, "on the mat. 🙂")):
        assert (
            trained_text(turns, tokenizer, template, "last_assistant") == f"<think>\n\n</think>\n\n{answer}<|im_end|>"
        )
    assert trained_text(ONE, tokenizer, template, "all_assistant").endswith("3 plus 4 is 7.<|im_end|>")


def test_mistrals_moving_system_turn_is_refused_too(tmp_path: Path):
    tokenizer, template = opened(tmp_path, unmarked(MISTRAL))
    turns = [{"role": "system", "content": "Be brief."}, *TWO]
    with pytest.raises(ValueError, match=r"Be brief"):
        encode(example(turns), tokenizer, template, "all_assistant", row=0)
    assert trained_text(turns, tokenizer, template, "last_assistant") == " on the mat. 🙂</s>"
    assert trained_text(TWO, tokenizer, template, "all_assistant") == " 3 plus 4 is 7.</s> on the mat. 🙂</s>"


def test_marks_stand_in_where_prefixes_do_not_hold(tmp_path: Path):
    tokenizer, template = opened(tmp_path, THINKING_MARKED)
    encoded = encode_row(example(TWO), tokenizer, template, "all_assistant")
    trained = [i for i, weight in zip(encoded.ids, encoded.weights, strict=True) if weight]
    assert tokenizer.decode(trained, keep_special=True) == "3 plus 4 is 7.<|im_end|>on the mat. 🙂<|im_end|>"
    assert any("generation %} marks" in remark for remark in encoded.remarks)


def test_an_end_token_after_the_whole_text_alone_is_no_obstacle(tmp_path: Path):
    tokenizer, template = opened(tmp_path, unmarked(PHI_3))
    trained = trained_text(TWO, tokenizer, template, "all_assistant")
    assert trained == "3 plus 4 is 7.<|end|>on the mat. 🙂<|end|>\n</s>"
    assert trained_text(TWO, tokenizer, template, "last_assistant") == "on the mat. 🙂<|end|>\n</s>"


def test_a_template_whose_ending_changes_is_refused_where_it_matters(tmp_path: Path):
    source = (
        "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% else %}THE END{% endif %}"
    )
    tokenizer, template = opened(tmp_path, source)
    with pytest.raises(ValueError, match=r"cannot be found.*THE END"):
        encode(example(TWO), tokenizer, template, "all_assistant", row=0)


def test_a_tool_call_that_the_template_does_not_write_is_refused(tmp_path: Path):
    call = {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}
    asked = Example((Message("user", "What is the weather?"), Message("assistant", "", extra=call)))
    tokenizer, template = opened(tmp_path, NO_END)
    with pytest.raises(RefusedConversation, match="does not write tool calls"):
        encode(asked, tokenizer, template, "all_assistant")


def test_a_first_token_that_takes_the_space_before_it_along_is_trained(tmp_path: Path):
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer, template = opened(tmp_path, source)
    encoded = encode_row(example(ONE), tokenizer, template, "all_assistant")
    trained = [i for i, weight in zip(encoded.ids, encoded.weights, strict=True) if weight]
    answer = next(message.content for message in example(ONE).messages if message.role == "assistant")
    assert tokenizer.decode(trained, keep_special=True).strip() == f"{answer}</s>"
    assert any("space before it" in remark for remark in encoded.remarks)
    pieces = encode_row(Text((("The cat sat on the ", False), ("mat", True))), tokenizer, template, "all_assistant")
    trained = [i for i, weight in zip(pieces.ids, pieces.weights, strict=True) if weight]
    assert tokenizer.decode(trained).strip() == "mat"


NO_END = (
    "{% for m in messages %}{{ '\n\n' + m.role + ': ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nassistant:' }}{% endif %}"
)


def test_a_missing_end_token_is_added_where_it_is_sound(tmp_path: Path):
    tokenizer, template = opened(tmp_path, NO_END)
    encoded = encode_row(example(TWO), tokenizer, template, "all_assistant")
    trained = [i for i, weight in zip(encoded.ids, encoded.weights, strict=True) if weight]
    assert tokenizer.decode(trained, keep_special=True) == " 3 plus 4 is 7. on the mat. 🙂</s>"
    assert encoded.end_added
    assert (encoded.responses, encoded.ends) == (2, (tokenizer.eos_id,))
    assert not encode_row(example(ONE), *opened(tmp_path / "b", CHATML), "all_assistant").end_added


def test_an_end_token_printed_only_before_the_next_turn_belongs_to_the_response(tmp_path: Path):
    source = (
        "{% for m in messages %}{% if m.role == 'user' and not loop.first %}{{ eos_token }}{% endif %}"
        "{{ m.role + ':' + m.content }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer, template = opened(tmp_path, source)
    encoded = encode_row(example(TWO), tokenizer, template, "all_assistant")
    trained = [i for i, weight in zip(encoded.ids, encoded.weights, strict=True) if weight]
    assert tokenizer.decode(trained, keep_special=True) == "3 plus 4 is 7.</s>on the mat. 🙂</s>"
    assert encoded.ends == (tokenizer.eos_id, tokenizer.eos_id)


def test_a_generation_prompt_that_training_text_lacks_is_remarked(tmp_path: Path):
    source = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    tokenizer, template = opened(tmp_path, unmarked(source))
    encoded = encode_row(example(ONE), tokenizer, template, "all_assistant")
    trained = [i for i, weight in zip(encoded.ids, encoded.weights, strict=True) if weight]
    assert tokenizer.decode(trained, keep_special=True) == "3 plus 4 is 7.<|im_end|>"
    assert any("<think>" in remark for remark in encoded.remarks)


def test_generation_stops_at_the_templates_own_end(tmp_path: Path):
    tokenizer, template = opened(tmp_path, unmarked(CHATML))
    assert tokenizer.end_ids == {tokenizer.id_of("</s>")}
    assert end_ids(tokenizer, template) == {tokenizer.id_of("</s>"), tokenizer.id_of("<|im_end|>")}


def test_plain_text_begins_and_ends_and_trains_its_pieces(tmp_path: Path):
    tokenizer, template = opened(tmp_path, None)
    whole = encode(Text((("The cat sat.", True),)), tokenizer, template)
    assert list(whole.ids) == [tokenizer.bos_id, *tokenizer.encode("The cat sat."), tokenizer.eos_id]
    assert whole.weights == (0.0, *[1.0] * (len(whole.ids) - 1))
    half = encode(Text((("The cat", False), (" sat.", True))), tokenizer, template)
    assert half.ids == whole.ids
    trained = [i for i, weight in zip(half.ids, half.weights, strict=True) if weight]
    assert tokenizer.decode(trained, keep_special=True) == " sat.</s>"


def spoken(text: str) -> bool:
    """Whether a text says something and cannot run together with the line break before it."""
    return bool(text.strip()) and not text[0].isspace()


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(spoken)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(words, min_size=2, max_size=6))
def test_whatever_is_said_the_trained_tokens_spell_the_responses(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
):
    tokenizer, template = opened(tmp_path_factory.getbasetemp() / "spelled", unmarked(CHATML))
    texts = texts[: len(texts) // 2 * 2]
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
    assert trained_text(turns, tokenizer, template, "all_assistant") == "".join(f"{t}<|im_end|>" for t in texts[1::2])


def test_every_template_of_these_tests_is_either_masked_or_refused(tmp_path: Path):
    for name, source in ALL.items():
        tokenizer, template = opened(tmp_path / name, source)
        sequence = encode(example(TWO), tokenizer, template, "last_assistant", row=0)
        end = max(k for k, weight in enumerate(sequence.weights) if weight)
        assert sequence.ids[end] in end_ids(tokenizer, template), name


def compared(folder: Path, source: str, prompt: list[dict[str, Any]], answers: list[str], **ends: Any) -> Any:
    """The sequences of the answers to a prompt, the tokenizer and the template."""
    tokenizer_folder = chat_tokenizer(folder, source)
    if ends:
        (tokenizer_folder / "generation_config.json").write_text(json.dumps(ends))
    tokenizer = Tokenizer.load(tokenizer_folder)
    template = ChatTemplate.open("auto", tokenizer)
    turns = tuple((Message("assistant", answer),) for answer in answers)
    preference = Preference(messages_of(prompt, "prompt"), turns, tuple(range(len(answers))))
    encoder = ComparisonEncoder(DataSettings(), tokenizer, template, Tally(), budget=4096)
    comparisons = encoder.encode([Source(0, "rows:1", preference, None)], "pairs", seed=0)
    return comparisons, tokenizer, template


@pytest.mark.parametrize("name", ALL)
def test_a_compared_answer_is_trained_as_in_fine_tuning_and_ends_where_generation_stops(tmp_path: Path, name: str):
    answers = ["on the mat. 🙂", "on the mat. It sat", "no"]
    comparisons, tokenizer, template = compared(tmp_path, unmarked(ALL[name]), TWO[:-1], answers)
    for sequence, answer in zip(comparisons[0].sequences, answers, strict=True):
        told = [*TWO[:-1], {"role": "assistant", "content": answer}]
        expected = encode(example(told), tokenizer, template, "last_assistant", row=0)
        count = max(k for k, weight in enumerate(expected.weights) if weight) + 1
        assert (sequence.ids, sequence.weights) == (expected.ids[:count], expected.weights[:count])
        assert sequence.ids[-1] in end_ids(tokenizer, template)
    # The prompt is shared but for the position that predicts the first token of the answers.
    first = [next(k for k, weight in enumerate(s.weights) if weight) for s in comparisons[0].sequences]
    assert comparisons.shared.tolist() == [0, first[0] - 1, first[0] - 1]
    assert len(set(first)) == 1


def test_a_compared_answer_ends_at_its_first_end_token(tmp_path: Path):
    """Phi 3 writes two of them, and generation stops at the first."""
    plain, tokenizer, _ = compared(tmp_path / "a", unmarked(PHI_3), ONE[:-1], ["7.", "8."])
    ends = [tokenizer.eos_id, tokenizer.id_of("<|end|>")]
    stopped, *_ = compared(tmp_path / "b", unmarked(PHI_3), ONE[:-1], ["7.", "8."], eos_token_id=ends)
    for found, end in ((plain, "<|end|>\n</s>"), (stopped, "<|end|>")):
        for sequence, answer in zip(found[0].sequences, ("7.", "8."), strict=True):
            trained = [i for i, weight in zip(sequence.ids, sequence.weights, strict=True) if weight]
            assert tokenizer.decode(trained, keep_special=True) == answer + end
