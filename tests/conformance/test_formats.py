"""Every listed format: recognised from its own sample and no other, read, repaired, and written as JSON and back."""

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.data.answers import repair_answers
from burnish.data.formats import FORMATS, announce, check_format, recognise
from burnish.data.reading import check_data
from burnish.data.repair import repair
from burnish.settings import DataSettings
from burnish.types import Example, Judged, Preference, Prompt, Text


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_from_its_sample_alone(name: str):
    sample = FORMATS[name].sample
    assert recognise([sample, sample]) == name
    others = [other for other in FORMATS if FORMATS[other].fits(sample) and other != name]
    # A row that compares answers may be read as something else if told so, but never by itself.
    assert not others or (FORMATS[name].compares and not any(FORMATS[other].compares for other in others))
    assert set(sample) <= FORMATS[name].columns


@pytest.mark.parametrize("name", FORMATS)
def test_a_sample_is_read_as_something_clean(name: str):
    reading = FORMATS[name].read(FORMATS[name].sample)
    if isinstance(reading, Prompt):
        assert reading.messages[-1].role == "user"
        return
    result = repair_answers(reading) if isinstance(reading, Preference | Judged) else repair(reading)
    assert (result.example, result.rules, result.dropped) == (reading, (), None)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_it_is_announced(tmp_path: Path, name: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**FORMATS[name].sample, "extra": 1}) + "\n")
    told = check_data(DataSettings(path=str(path)))
    assert f"reads as {name}: {FORMATS[name].reading}; not used: extra" in told
    assert check_data(DataSettings(path=str(path), format=name)) == told


@pytest.mark.parametrize("name", FORMATS)
def test_a_value_of_the_wrong_kind_is_an_error_that_names_the_column(tmp_path: Path, name: str):
    for column in FORMATS[name].sample.keys() - {"task"}:  # a task may be named by a number
        path = tmp_path / f"{column}.jsonl"
        path.write_text(json.dumps({**FORMATS[name].sample, column: 7}) + "\n")
        with pytest.raises(ValueError, match=rf"rows|`?{column}`?") as caught:
            check_data(DataSettings(path=str(path), format=name))
        assert f"{path}:1: " in str(caught.value)
        assert column in str(caught.value)
        assert "\n" not in str(caught.value)


def roles(reading: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in reading.messages]


def test_what_each_column_becomes():
    read = {name: format.read for name, format in FORMATS.items()}
    alpaca = {
        "system": "Be brief.",
        "history": [["one", "two"]],
        "instruction": "Sort.",
        "input": "b a",
        "output": "a b",
    }
    assert roles(read["alpaca"](alpaca)) == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "Sort.\n\nb a"),
        ("assistant", "a b"),
    ]
    lima = {"conversations": ["a", "b", "c", "d"]}
    assert [role for role, _ in roles(read["lima"](lima))] == ["user", "assistant", "user", "assistant"]
    assert read["text"]({"text": "as it is"}) == Text((("as it is", True),))
    completion = {"prompt": "The sky", "completion": " is blue"}
    assert read["prompt_completion"](completion) == Text((("The sky", False), (" is blue", True)))
    prompt = read["prompt"]({"prompt": "3+4?", "answer": "7", "task": "add"})
    assert (roles(prompt), prompt.answer, prompt.task) == ([("user", "3+4?")], "7", "add")


def test_prompt_and_completion_of_messages_train_the_completion_alone():
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    read = FORMATS["prompt_completion"].read({"prompt": turns, "completion": [{"role": "assistant", "content": "x"}]})
    assert isinstance(read, Example)
    assert [message.weight for message in read.messages] == [None, 0.0, None, None]


def test_names_of_roles_in_the_wild():
    names = {"human": "user", "User": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
    names |= {"system": "system", "assistant": "assistant", "tool": "tool", "observation": "tool", "function": "tool"}
    row = {"conversations": [{"from": name, "value": name} for name in names]}
    assert [role for role, _ in roles(FORMATS["sharegpt"].read(row))] == list(names.values())
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    read = FORMATS["sharegpt"].read({"conversations": [{"from": "human", "value": "x"}, call]})
    assert isinstance(read, Example)
    assert read.messages[1].extra["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_messages_keep_weights_tools_and_parts():
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "content": "1", "tool_call_id": "k", "name": None},
        {"role": "assistant", "content": "c", "weight": 0.5, "tool_calls": None},
    ]
    for column in (tools, json.dumps(tools)):
        read = FORMATS["messages"].read({"messages": turns, "tools": column})
        assert isinstance(read, Example)
        assert read.tools == tuple(tools)
        assert [message.content for message in read.messages] == ["ab", "", "1", "c"]
        assert [message.weight for message in read.messages] == [None, None, None, 0.5]
        assert read.messages[1].extra["tool_calls"][0]["function"]["arguments"] == {"x": 1}
        assert read.messages[2].extra == {"tool_call_id": "k"}
        assert read.messages[3].extra == {}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "wizard", "content": "x"}, "turn 1 has the unknown role 'wizard'; known are assistant, "),
        ({"role": "assistant", "content": 3}, "turn 1: the content should be text, not a number"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "not parts of kind image_url"),
        ({"role": "assistant", "content": "x", "weight": -1}, "`weight` should be a number of at least 0, not -1"),
        ({"role": "assistant"}, "turn 1 has neither `content` nor `tool_calls`"),
        ("hello", "turn 1 should be {role, content}, not text"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "should be a JSON object",
        ),
        ({"role": "assistant", "tool_calls": [{"id": 3}]}, "a tool call needs a `function` with a `name`"),
    ],
)
def test_a_wrong_turn_is_named(turn: Any, message: str):
    with pytest.raises(ValueError, match=r".") as caught:
        FORMATS["messages"].read({"messages": [{"role": "user", "content": "x"}, turn]})
    assert message in str(caught.value)


def test_rows_that_fit_two_formats_show_both_readings():
    with pytest.raises(ValueError, match="the rows read two ways") as caught:
        recognise([{"instruction": "a", "output": "b", "text": "c"}])
    told = str(caught.value)
    assert FORMATS["alpaca"].reading in told
    assert FORMATS["text"].reading in told
    assert told.endswith("write data.format=alpaca or data.format=text")


def test_rows_that_fit_no_format_show_what_was_found_and_what_is_known():
    with pytest.raises(ValueError, match=r"columns review \(text\), stars \(a number\)") as caught:
        recognise([{"review": "a", "stars": 3}])
    assert all(name in str(caught.value) and format.needs in str(caught.value) for name, format in FORMATS.items())


def test_rows_that_compare_answers_are_that_whatever_else_they_hold():
    pair = FORMATS["prompt_chosen_rejected"].sample
    turns = FORMATS["messages"].sample["messages"]
    assert recognise([{**pair, "messages": turns, "score_chosen": 2.0, "score_rejected": 1.0}]) == (
        "prompt_chosen_rejected"
    )
    judged = FORMATS["judged"].sample
    assert recognise([judged, {**judged, "label": 0}]) == "judged"
    assert recognise([{**judged, "label": "a name"}]) == "prompt_completion"
    # One row without a label does not make the others examples to learn from.
    with pytest.raises(ValueError, match=r"row 1: the data reads as judged, which needs .*`label` \(true or false\)"):
        recognise([judged, {"prompt": "a", "completion": "b"}])
    ranked = FORMATS["ranked_answers"].sample
    with pytest.raises(ValueError, match=r"data\.format=prompt_chosen_rejected or data\.format=ranked_answers"):
        recognise([{**pair, **ranked}])
    assert recognise([{"prompt": "a", "answers": ["b", "c"]}]) == "prompt"  # nothing says which is better


def test_a_row_that_disagrees_is_named(tmp_path: Path):
    rows = [{"text": "a"}, {"text": "b"}, {"prompt": "c"}]
    with pytest.raises(ValueError, match=r"x\.jsonl:9: the data reads as text.*columns prompt \(text\)"):
        recognise(rows, ["x.jsonl:7", "x.jsonl:8", "x.jsonl:9"])
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"late\.jsonl:3: the data reads as text"):
        check_data(DataSettings(path=str(path)))


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"data\.format=alpacca is not known; write one of auto, alpaca, "):
        check_format("alpacca")
    assert announce("text", [{"text": "a"}]) == "reads as text: text as it stands, every token trained"


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real data samples is not there")
@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("gsm8k_train_2000.jsonl", "reads as question_answer"),
        ("sharegpt_fastchat_dummy.json", "reads as sharegpt"),
        ("tinyshakespeare.txt", "reads as text"),
        ("self_instruct_seed_tasks.jsonl", None),
    ],
)
def test_real_samples(file: str, expected: str | None):
    settings = DataSettings(path=str(SHARED / file))
    if expected is None:
        with pytest.raises(ValueError, match=r"no known format has the columns id .*instances"):
            check_data(settings)
    else:
        assert expected in check_data(settings)
