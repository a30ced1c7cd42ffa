"""Prompts out of rows of every format, and the order in which a run is given them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.chat import prompt_ids
from burnish.data.prompts import PreparedPrompts, PromptStream, prepare_prompts
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.settings import DataSettings, EvaluateSettings
from burnish.types import Message, Prompt
from tests.tiny import tiny_tokenizer

NONE = EvaluateSettings(fraction=0.0)
Text = tuple[Tokenizer, ChatTemplate]


@pytest.fixture
def text(tmp_path: Path) -> Text:
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path / "tokenizer"))
    return tokenizer, ChatTemplate.open("auto", tokenizer)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(
    tmp_path: Path,
    text: Text,
    rows: list[dict[str, Any]],
    evaluate: EvaluateSettings = NONE,
    most: int = 64,
    **settings: Any,
) -> PreparedPrompts:
    data = DataSettings(path=write(tmp_path / "rows.jsonl", rows), **settings)
    return prepare_prompts(data, evaluate, *text, seed=0, max_prompt_tokens=most)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("row", "asked", "answer"),
    [
        ({"prompt": "q", "answer": "7", "task": "add"}, ["q"], "7"),
        ({"prompt": "q"}, ["q"], None),
        ({"prompt": turns("q", "a", "r")}, ["q", "a", "r"], None),
        ({"messages": turns("q", "a", "r", "b")}, ["q", "a", "r"], "b"),
        ({"messages": turns("q", "a", "r")}, ["q"], "a"),
        ({"instruction": "q", "output": "a"}, ["q"], "a"),
        ({"prompt": "q", "completion": " a"}, ["q"], "a"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["q"], "a"),
        ({"prompt": "q", "answers": ["a", "b", "c"], "scores": [1, 3, 2]}, ["q"], "b"),
        ({"prompt": "q", "completion": "a", "label": True}, ["q"], "a"),
        ({"prompt": "q", "completion": "a", "label": False}, ["q"], None),
        # An answer of several turns is no reference for the next one, nor is one to another question of the user.
        ({"chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "c")}, ["q"], None),
        ({"chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "a", "s", "b")}, ["q"], None),
    ],
)
def test_what_rows_of_each_format_ask(tmp_path: Path, text: Text, row: dict[str, Any], asked: list[str], answer: Any):
    prepared = made(tmp_path, text, [row])
    (prompt,) = prepared.train
    assert [message.content for message in prompt.messages] == asked
    assert prompt.messages[-1].role == "user"
    assert (prompt.answer, prompt.task) == (answer, row.get("task"))
    assert list(prepared.tokens[0].ids) == prompt_ids(prompt.messages, *text)


def test_prompts_that_leave_no_room_are_dropped_and_counted(tmp_path: Path, text: Text):
    rows = [{"prompt": "q"}, {"prompt": "q" * 60}, {"prompt": "r"}, {"prompt": "q"}]
    most = len(prompt_ids([Message("user", "q")], *text))
    prepared = made(tmp_path, text, rows, most=most)
    audit = prepared.audit
    assert [prompt.messages[0].content for prompt in prepared.train] == ["q", "r", "q"]
    assert (audit.rows_in, audit.rows_out, audit.lengths.longest) == (4, 3, most)
    assert audit.dropped["prompt_too_long"].rows == (1,)
    assert audit.duplicates.rows == (3,)
    lines = audit.lines()
    assert any("4 in = 3 to train on + 0 held out + 1 dropped" in line for line in lines)
    assert not any(line.startswith(("packing", "responses")) for line in lines)
    with pytest.raises(
        ValueError, match=rf"more than {most} tokens, .* in 1 row: .*:2; write a larger data\.max_lengt"
    ):
        made(tmp_path, text, rows, most=most, too_long="error")
    with pytest.raises(ValueError, match=r"no row of .* is left to answer: prompt_too_long 4 rows"):
        made(tmp_path, text, rows, most=2)
    with pytest.raises(ValueError, match=r"leaves no room for a prompt: write a larger data\.max_length"):
        made(tmp_path, text, rows, most=0)


def test_plain_text_asks_nothing(tmp_path: Path, text: Text):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: text asks nothing .*: write rows with a `prompt` column"):
        made(tmp_path, text, [{"text": "Once upon a time."}])


def test_prompts_are_held_out_with_families_in_turn(tmp_path: Path, text: Text):
    rows = [{"prompt": f"q{k}", "answer": str(k), "task": f"t{k % 4}"} for k in range(80)]
    prepared = made(tmp_path, text, rows, EvaluateSettings(fraction=0.25))
    held = [prompt.messages[0].content for prompt in prepared.held_out]
    assert len(held) == prepared.audit.held_out.rows == 20
    assert sorted(held + [prompt.messages[0].content for prompt in prepared.train]) == sorted(r["prompt"] for r in rows)
    assert len({prompt.task for prompt in prepared.held_out[:4]}) == 4
    other = write(tmp_path / "held.jsonl", [{"prompt": "q3"}, {"messages": turns("new", "a")}][1:] * 2)
    evaluated = made(tmp_path, text, rows, EvaluateSettings(path=other))
    assert [prompt.answer for prompt in evaluated.held_out] == ["a", "a"]


def test_the_embedded_prompts(text: Text):
    prepared = prepare_prompts(DataSettings(limit=30), EvaluateSettings(), *text, seed=0, max_prompt_tokens=512)
    assert len(prepared.train) == 30
    assert all(prompt.answer and prompt.task for prompt in prepared.train)
    assert "held_out_seen, held_out_unseen" in prepared.audit.held_out.how
    assert len(prepared.held_out) == 60


def some(count: int) -> list[Prompt]:
    return [Prompt((Message("user", f"q{k}"),), str(k)) for k in range(count)]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 12), per_step=st.integers(1, 9), world=st.integers(1, 3), seed=st.integers(0, 3))
def test_steps_deal_every_prompt_once_an_epoch(count: int, per_step: int, world: int, seed: int):
    per_step = max(per_step, world)
    prompts = some(count)
    ranks = [PromptStream(prompts, per_step, seed, rank, world) for rank in range(world)]
    alone = PromptStream(prompts, per_step, seed)
    assert {stream.fingerprint for stream in ranks} == {alone.fingerprint}
    dealt: list[int] = []
    for step in range(3 * count):
        parts = [stream.step(step) for stream in ranks]
        whole = alone.step(step)
        assert len(whole) == per_step
        assert sorted(number for part in parts for number, _ in part) == sorted(number for number, _ in whole)
        assert all(prompt == prompts[number] for part in parts for number, prompt in part)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        dealt += [number for number, _ in whole]
    for epoch in range(3):
        assert sorted(dealt[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert alone.steps_in(1) == -(-count // per_step)
    assert alone.steps_in(2.5) == -(-5 * count // (2 * per_step))


def test_a_step_depends_on_its_number_alone():
    forward, other = (PromptStream(some(10), 4, seed=3) for _ in range(2))
    whole = [forward.step(step) for step in range(9)]
    for step in (8, 2, 5, 2, 0):
        assert other.step(step) == whole[step]
    epochs = [
        tuple(n for step in range(5 * e, 5 * e + 5) for n, _ in PromptStream(some(10), 2, 3).step(step))
        for e in range(4)
    ]
    assert len(set(epochs)) == 4
    assert Counter(epochs[0]) == Counter(range(10))
    assert PromptStream(some(10), 4, seed=4).step(0) != whole[0]


def test_the_fingerprint_knows_prompts_seed_and_step():
    base = PromptStream(some(5), 2, 0).fingerprint
    changed = [*some(4), Prompt((Message("user", "q4"),), "other")]
    others = [PromptStream(some(5), 2, 1), PromptStream(some(5), 3, 0), PromptStream(changed, 2, 0)]
    assert base not in {stream.fingerprint for stream in others}


def test_what_cannot_be_dealt_is_an_error():
    with pytest.raises(ValueError, match="no prompts to train on"):
        PromptStream([], 2, 0)
    with pytest.raises(ValueError, match=r"rollout\.prompts=1 is less than one for each of 2 ranks"):
        PromptStream(some(3), 1, 0, rank=0, world=2)
