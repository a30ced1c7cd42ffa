import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.data.audit import Audit
from burnish.data.prepare import Prepared, prepare, prepare_evaluation
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.settings import DataSettings, EvaluateSettings
from tests.tiny import tiny_tokenizer

NONE = EvaluateSettings(fraction=0.0)


@pytest.fixture
def text(tmp_path: Path) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path / "tokenizer"))
    return tokenizer, ChatTemplate.open("auto", tokenizer)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(*contents: str, **extra: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": content} for k, content in enumerate(contents)], **extra}


def made(
    tmp_path: Path,
    text: tuple[Tokenizer, ChatTemplate],
    rows: list[dict[str, Any]],
    evaluate: EvaluateSettings = NONE,
    **settings: Any,
) -> Prepared:
    data = DataSettings(path=write(tmp_path / "rows.jsonl", rows), **settings)
    return prepare(data, evaluate, *text, seed=0, cache=tmp_path / "cache")


DIRTY = [
    turns("q0", "r0"),
    {"messages": [{"role": "assistant", "content": "hi"}, *turns("q1", "r1")["messages"]]},
    turns("q2", " "),
    turns("q3", "r3", "bye"),
    turns("q0", "r0"),
    turns("q5", "r" * 300),
]


def test_every_row_is_accounted_for(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    prepared = made(tmp_path, text, DIRTY, max_length=64)
    audit = prepared.audit
    path = str(tmp_path / "rows.jsonl")
    assert (audit.rows_in, audit.rows_out) == (6, 4)
    assert {name: (found.count, found.rows) for name, found in audit.dropped.items()} == {
        "empty_response": (1, (2,)),
        "too_long": (1, (5,)),
    }
    assert audit.dropped["too_long"].places == (f"{path}:6",)
    assert {name: found.rows for name, found in audit.repaired.items()} == {
        "leading_assistant": (1,),
        "trailing_user": (3,),
    }
    assert (audit.duplicates.count, audit.duplicates.rows) == (1, (4,))
    assert [sequence.row for sequence in prepared.train] == [0, 1, 3, 4]
    assert audit.lengths.tokens == sum(len(sequence.ids) for sequence in prepared.train)
    # Each answer is two letters, a digit apart from the letter, and the end token.
    assert audit.lengths.trained == 4 * 3
    assert (audit.responses, audit.ended, audit.end_tokens) == (4, 4, ("<|im_end|>",))
    assert sum(count for _, count in audit.lengths.histogram) == 4
    lines = audit.lines()
    assert any("6 in = 4 to train on + 0 held out + 2 dropped" in line for line in lines)
    assert any(f"1 row: {path}:6" in line for line in lines)
    assert len(lines) <= 40
    assert "\n".join(lines).isascii()


def test_dirty_rows_are_dropped_when_repair_is_off(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    audit = made(tmp_path, text, DIRTY, repair=False).audit
    assert {name: found.rows for name, found in audit.dropped.items()} == {
        "leading_assistant": (1,),
        "empty_response": (2,),
        "trailing_user": (3,),
    }
    assert not audit.repaired


def test_an_audit_survives_its_json(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    audit = made(tmp_path, text, DIRTY).audit
    tree = json.loads(json.dumps(audit.as_dict()))
    assert Audit.from_dict(tree) == audit
    assert tree["ended_share"] == 1.0
    assert tree["lengths"]["context"] == tree["lengths"]["tokens"] - tree["lengths"]["trained"]


def test_a_second_time_comes_from_the_cache(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    rows = [turns(f"q{k}", f"r{k}", task=str(k % 3)) for k in range(20)]
    evaluate = EvaluateSettings(fraction=0.25, prompts=3)
    first, again = (made(tmp_path, text, rows, evaluate) for _ in range(2))
    assert (first.cached, again.cached) == (False, True)
    assert list(first.train) == list(again.train)
    assert list(first.held_out) == list(again.held_out)
    assert (first.prompts, first.audit) == (again.prompts, again.audit)
    assert made(tmp_path, text, rows, evaluate, train_on="everything").cached is False
    assert made(tmp_path, text, [*rows, turns("new", "row")], evaluate).cached is False
    for broken in (tmp_path / "cache").glob("*/sequences.safetensors"):
        broken.write_bytes(b"broken")
    mended = made(tmp_path, text, rows, evaluate)
    assert (mended.cached, list(mended.train)) == (False, list(first.train))
    assert made(tmp_path, text, rows, evaluate).cached is True


def test_a_cache_that_cannot_be_written_is_a_note(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    (tmp_path / "cache").write_text("a file where the folder should be")
    prepared = made(tmp_path, text, [turns("q", "r")])
    assert len(prepared.train) == 1
    assert "could not be kept" in prepared.audit.notes[-1]


def test_splitting_keeps_every_target(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    rows = [turns("a question", "The cat sat on the mat. " * 20), {"messages": turns("x" * 90, "y")["messages"]}]
    whole = made(tmp_path, text, rows)
    split = made(tmp_path, text, rows, max_length=24, too_long="split")
    assert max(split.train.lengths) <= 24
    for row in (0, 1):
        targets = [
            (i, w)
            for sequence in split.train
            if sequence.row == row
            for i, w in zip(sequence.ids[1:], sequence.weights[1:], strict=True)
            if w
        ]
        expected = whole.train[row]
        assert targets == [(i, w) for i, w in zip(expected.ids, expected.weights, strict=True) if w]
    assert split.audit.rows_out == 2
    assert split.audit.split.rows == (0, 1)
    assert any("does not see what came before" in note for note in split.audit.notes)
    assert any("pieces of split rows held context alone" in note for note in split.audit.notes)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([turns("q", "r" * 90)], {"max_length": 32}, r"no row of .* is left to train on: too_long 1 row: .*:1"),
        (
            [turns("q", "r"), turns("q", "r" * 90)],
            {"max_length": 32, "too_long": "error"},
            r"more tokens than data\.max_length=32 in 1 row: .*:2; write data\.max_length=\d+, or data\.too_long=",
        ),
        (
            [turns("q", "r"), {"messages": [{**turn, "weight": 0} for turn in turns("q", "r")["messages"]]}],
            {},
            r"nothing to train on with .* in 1 row: .*:2; write data\.allow_untrained=true",
        ),
        ([{"messages": [{"role": "wizard", "content": "x"}]}], {}, r"rows\.jsonl:1: .*unknown role 'wizard'"),
        ([{"prompt": "only a question"}], {}, r"which is prompts and not examples to learn from: .* evaluate\.path="),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b"}],
            {},
            r"rows\.jsonl reads as prompt_chosen_rejected .*: train on them with `burnish dpo` or `burnish reward`",
        ),
        (
            [{"prompt": "q", "completion": "a", "label": True}],
            {},
            r"rows\.jsonl reads as judged .*: train on them with `burnish dpo loss=kto`, or name another data\.format",
        ),
        ([turns("q", "r")], {"format": "alpacca"}, r"data\.format=alpacca is not known"),
        ([turns("q", "r"), {"text": "x"}], {"format": "messages"}, r"rows\.jsonl:2: the data reads as messages"),
        ([], {}, r"rows\.jsonl holds no rows"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, text: tuple[Tokenizer, ChatTemplate], rows: list[Any], settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message) as caught:
        made(tmp_path, text, rows, **settings)
    assert "\n" not in str(caught.value)


def test_untrained_rows_may_be_dropped(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    idle = {"messages": [{**turn, "weight": 0} for turn in turns("q", "r")["messages"]]}
    audit = made(tmp_path, text, [idle, turns("q", "r")], allow_untrained=True).audit
    assert audit.dropped["untrained"].rows == (0,)


def test_conversations_a_template_declines_are_counted(tmp_path: Path):
    source = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    folder = tiny_tokenizer(tmp_path / "t", source + "{{ m.content + '<|im_end|>' }}{% endfor %}")
    tokenizer = Tokenizer.load(folder)
    system = {"messages": [{"role": "system", "content": "s"}, *turns("q", "r")["messages"]]}
    audit = made(tmp_path, (tokenizer, ChatTemplate.open("auto", tokenizer)), [turns("q", "r"), system]).audit
    found = audit.dropped["template_refused"]
    assert (found.rows, found.example) == ((1,), "no system turns")


def test_a_tokenizer_without_a_template_reads_text_but_no_conversation(tmp_path: Path):
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path / "t", None))
    text = tokenizer, ChatTemplate.open("auto", tokenizer)
    assert len(made(tmp_path, text, [{"text": "The cat."}]).train) == 1
    with pytest.raises(ValueError, match=r"ships no chat template: write model\.template=chatml\|alpaca\|vicuna"):
        made(tmp_path, text, [turns("q", "r")])


def test_held_out_rows_have_no_twin_in_training(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    rows = [turns(f"question {k % 40}", f"answer {k}", task=f"t{k % 4}") for k in range(120)]
    evaluate = EvaluateSettings(fraction=0.2, prompts=10)
    prepared = made(tmp_path, text, rows, evaluate)
    asked = [rows[sequence.row]["messages"][0]["content"] for sequence in prepared.held_out]
    trained = {rows[sequence.row]["messages"][0]["content"] for sequence in prepared.train}
    assert 21 <= len(asked) <= 24  # groups of three: 24 are wanted
    assert not trained & set(asked)
    assert len(prepared.train) + len(asked) == 120
    assert prepared.audit.held_out.rows == len(asked)
    # Prompts are held-out rows, their last turn the answer, the families of tasks in turn.
    assert len(prepared.prompts) == 10
    for prompt in prepared.prompts:
        row = rows[int((prompt.answer or "").split()[1])]
        assert [message.content for message in prompt.messages] == [row["messages"][0]["content"]]
        assert prompt.task == row["task"]
    tasks = {rows[sequence.row]["task"] for sequence in prepared.held_out}
    assert len(tasks) > 1
    assert {prompt.task for prompt in prepared.prompts[: len(tasks)]} == tasks
    # The order of the rows decides nothing.
    backwards = made(tmp_path, text, rows[::-1], evaluate)
    assert sorted(s.ids for s in backwards.held_out) == sorted(s.ids for s in prepared.held_out)
    other = prepare(DataSettings(path=str(tmp_path / "rows.jsonl")), evaluate, *text, seed=1, cache=tmp_path / "cache")
    assert sorted(s.ids for s in other.held_out) != sorted(s.ids for s in prepared.held_out)


def test_an_evaluation_file_loses_what_training_asks(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    held = write(tmp_path / "held.jsonl", [turns("q1", "other"), turns("new", "r")])
    evaluate = EvaluateSettings(path=held, prompts=5)
    prepared = made(tmp_path, text, [turns("q1", "r1"), turns("q2", "r2")], evaluate)
    assert [sequence.row for sequence in prepared.held_out] == [1]
    assert prepared.audit.held_out.dropped["also_in_training"].rows == (0,)
    assert [prompt.answer for prompt in prepared.prompts] == ["r"]
    assert (prepared.audit.rows_in, prepared.audit.rows_out) == (2, 2)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "3+4?", "answer": "7", "task": "add"}])
    asked = made(tmp_path, text, [turns("q1", "r1")], EvaluateSettings(path=prompts, prompts=5))
    assert [(prompt.answer, prompt.task) for prompt in asked.prompts] == [("7", "add")]
    assert len(asked.held_out) == 0
    same = EvaluateSettings(path=write(tmp_path / "same.jsonl", [turns("q1", "r1")]))
    with pytest.raises(ValueError, match=r"no row of evaluate\.path=.* is left .*also_in_training 1 row"):
        made(tmp_path, text, [turns("q1", "r1")], same)


def test_an_evaluation_file_of_compared_answers_is_refused(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    held = write(tmp_path / "held.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match=r"evaluate\.path=.*held\.jsonl reads as prompt_chosen_rejected"):
        made(tmp_path, text, [turns("q1", "r1")], EvaluateSettings(path=held))
    with pytest.raises(ValueError, match=r"which is preferences and not conversations or text to score"):
        prepare_evaluation(DataSettings(path=held), *text, prompts=1, seed=0)


def test_rows_that_also_compare_answers_can_be_read_as_examples(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    rows = [{**turns("q", "r"), "prompt": "q", "chosen": "r", "rejected": "s"}]
    assert len(made(tmp_path, text, rows, format="messages").train) == 1


def test_rows_for_evaluation_alone(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    data = DataSettings(path=write(tmp_path / "rows.jsonl", [turns(f"q{k}", f"r{k}") for k in range(5)]))
    held_out, prompts = prepare_evaluation(data, *text, prompts=2, seed=0)
    assert (len(held_out), len(prompts)) == (5, 2)


def test_plain_text_is_announced(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    (tmp_path / "book.txt").write_text("The cat sat.\n\nThe dog\nsat.\n")
    data = DataSettings(path=str(tmp_path / "book.txt"))
    prepared = prepare(data, NONE, *text, seed=0, cache=tmp_path / "cache")
    end = text[0].eos_id
    assert [list(sequence.ids) for sequence in prepared.train] == [
        [*text[0].encode("The cat sat."), end],
        [*text[0].encode("The dog\nsat."), end],
    ]
    assert prepared.audit.lengths.context == 2  # nothing predicts the first token of a text
    assert any("one document for each paragraph" in note for note in prepared.audit.notes)


def test_progress_hears_of_every_row(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate]):
    path = write(tmp_path / "rows.jsonl", [turns(f"q{k}", f"r{k}") for k in range(10)])
    heard: list[tuple[int, int]] = []
    prepare(
        DataSettings(path=path),
        EvaluateSettings(fraction=0.2),
        *text,
        seed=0,
        cache=tmp_path / "cache",
        progress=lambda done, rows: heard.append((done, rows)),
    )
    assert heard == [(k + 1, 10) for k in range(10)]


def test_data_is_prepared_without_torch():
    modules = "burnish.data.prepare, burnish.data.prompts, burnish.data.comparing, burnish.tools.data"
    code = f"import sys; import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real data samples is not there")
@pytest.mark.parametrize(
    ("file", "format", "rows"),
    [("gsm8k_train_2000.jsonl", "question_answer", 2000), ("sharegpt_fastchat_dummy.json", "sharegpt", 500)],
)
def test_real_samples(tmp_path: Path, text: tuple[Tokenizer, ChatTemplate], file: str, format: str, rows: int):
    audit = prepare(DataSettings(path=str(SHARED / file)), NONE, *text, seed=0, cache=tmp_path / "cache").audit
    assert (audit.format, audit.rows_in) == (format, rows)
    assert audit.rows_out + sum(found.count for found in audit.dropped.values()) == rows
    assert audit.ended == audit.responses >= audit.rows_out
    assert audit.lengths.efficiency > 0.95
