"""Rows of compared answers on their way into comparisons: every row accounted for, nothing cut, held out by prompt."""

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.data.audit import Audit
from burnish.data.chat import prompt_ids
from burnish.data.preferences import PreparedPreferences, prepare_preferences
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.settings import DataSettings, EvaluateSettings
from burnish.types import Message, Sequence
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

NONE = EvaluateSettings(fraction=0.0)
Text = tuple[Tokenizer, ChatTemplate]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Text:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return opened(tmp_path / "tokenizer")


def opened(folder: Path, template: str = CHAT_TEMPLATE) -> Text:
    tokenizer = Tokenizer.load(tiny_tokenizer(folder, template))
    return tokenizer, ChatTemplate.open("auto", tokenizer)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(
    tmp_path: Path,
    text: Text,
    rows: list[dict[str, Any]],
    evaluate: EvaluateSettings = NONE,
    kind: Any = "pairs",
    budget: int | None = None,
    **settings: Any,
) -> PreparedPreferences:
    data = DataSettings(path=write(tmp_path / "rows.jsonl", rows), **settings)
    return prepare_preferences(data, evaluate, *text, seed=0, budget=budget, kind=kind)


def pair(prompt: str, chosen: str, rejected: str, **extra: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}


def judged(prompt: str, completion: str, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def written(sequence: Sequence, tokenizer: Tokenizer) -> tuple[str, str]:
    """What is read first and what is trained on, as text."""
    first = next(number for number, weight in enumerate(sequence.weights) if weight)
    assert all(weight == 1.0 for weight in sequence.weights[first:])
    before, after = sequence.ids[:first], sequence.ids[first:]
    return tokenizer.decode(before, keep_special=True), tokenizer.decode(after, keep_special=True)


def asked(prompt: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def test_each_answer_is_a_conversation_that_ends_at_its_end_token(tmp_path: Path, text: Text):
    rows = [pair("q0", "yes", "no", margin=0.5), pair("q1", "A.", "B, I think.")]
    prepared = made(tmp_path, text, rows)
    assert len(prepared.train) == 2
    for comparison, row in zip(prepared.train, rows, strict=True):
        assert [written(sequence, text[0]) for sequence in comparison.sequences] == [
            (asked(row["prompt"]), f"{row['chosen']}<|im_end|>"),  # and not the line break that follows it
            (asked(row["prompt"]), f"{row['rejected']}<|im_end|>"),
        ]
        assert all(sequence.ids[-1] in text[0].end_ids for sequence in comparison.sequences)
        ids = prompt_ids([Message("user", row["prompt"])], *text)
        assert all(list(sequence.ids[: len(ids)]) == ids for sequence in comparison.sequences)
    assert [comparison.pairs for comparison in prepared.train] == [((0, 1, 0.5),), ((0, 1, 0.0),)]
    assert [comparison.labels for comparison in prepared.train] == [(), ()]


def test_every_turn_of_an_answer_that_is_the_assistants_is_trained(tmp_path: Path, text: Text):
    turns = [{"role": role, "content": content} for role, content in (("user", "q"), ("assistant", "a"))]
    more = [{"role": role, "content": content} for role, content in (("user", "r"), ("assistant", "b"))]
    rows = [{"chosen": [*turns, *more], "rejected": [turns[0], {"role": "assistant", "content": "c"}]}]
    chosen, rejected = made(tmp_path, text, rows).train[0].sequences
    trained = [i for i, weight in zip(chosen.ids, chosen.weights, strict=True) if weight]
    assert text[0].decode(trained, keep_special=True) == "a<|im_end|>b<|im_end|>"
    assert written(rejected, text[0]) == (asked("q"), "c<|im_end|>")
    last = made(tmp_path, text, rows, train_on="last_assistant").train[0].sequences[0]
    assert written(last, text[0])[1] == "b<|im_end|>"


def test_ranked_answers_are_compared_in_all_pairs_but_ties(tmp_path: Path, text: Text):
    rows = [{"prompt": "q", "answers": ["c", "a", "b", "B"], "ranks": [3, 1, 2, 2], "margin": 1}]
    comparison = made(tmp_path, text, rows).train[0]
    assert [written(sequence, text[0])[1][0] for sequence in comparison.sequences] == ["c", "a", "b", "B"]
    assert set(comparison.pairs) == {(1, 0, 1.0), (1, 2, 1.0), (1, 3, 1.0), (2, 0, 1.0), (3, 0, 1.0)}


DIRTY = [
    pair("q0", "yes", "no"),
    pair("q1", "same", "same"),
    pair("q2", "yes", " "),
    pair("q" * 90, "yes", "no"),
    pair("q4", "r" * 90, "no"),
    pair("q5", "no", "y" * 90),
    pair("q0", "yes", "no"),
    pair("q7", "yes", "no", score_chosen=1, score_rejected=1),
    {
        "prompt": [{"role": "user", "content": "q8"}, {"role": "user", "content": "q9"}],
        "chosen": "yes",
        "rejected": "n",
    },
]


def test_every_row_is_accounted_for(tmp_path: Path, text: Text):
    prepared = made(tmp_path, text, DIRTY, max_length=64)
    audit = prepared.audit
    assert (audit.rows_in, audit.rows_out, audit.format) == (9, 3, "prompt_chosen_rejected")
    assert {name: found.rows for name, found in audit.dropped.items()} == {
        "identical_answers": (1,),
        "empty_answer": (2,),
        "prompt_too_long": (3,),
        "too_long": (4, 5),
        "tied": (7,),
    }
    assert {name: found.rows for name, found in audit.repaired.items()} == {"repeated_role": (8,)}
    assert audit.duplicates.rows == (6,)
    assert [comparison.sequences[0].row for comparison in prepared.train] == [0, 6, 8]
    assert (audit.responses, audit.ended, audit.end_tokens) == (6, 6, ("<|im_end|>",))
    lines = audit.lines()
    assert any("9 in = 3 to train on + 0 held out + 6 dropped" in line for line in lines)
    assert any(f"2 rows: {tmp_path}/rows.jsonl:5, :6" in line for line in lines)
    assert Audit.from_dict(json.loads(json.dumps(audit.as_dict()))) == audit


def test_lengths_pairs_and_what_sharing_saves(tmp_path: Path, text: Text):
    # Letters one by one are tokens one by one: z has no neighbour that the tokenizer knows.
    rows = [pair("q", "zz", "z"), pair("q", "zzzz", "zz"), pair("q", "z", "zzz"), pair("q", "z", "x", margin=2)]
    prepared = made(tmp_path, text, rows)
    answers = prepared.audit.answers
    assert answers is not None
    assert (answers.pairs, answers.margins) == (4, 1)
    assert (answers.better_length, answers.worse_length) == ((3 + 5 + 2 + 2) / 4, (2 + 3 + 4 + 2) / 4)
    assert (answers.longer, answers.shorter) == (0.5, 0.25)
    prompt = len(prompt_ids([Message("user", "q")], *text))
    whole = 8 * prompt + 12 + 11
    assert prepared.audit.lengths.tokens == whole
    assert answers.stored == whole - 4 * (prompt - 1)
    told = "\n".join(prepared.audit.lines())
    assert "pairs       4, 1 with a margin; better answers have 3.0 tokens on average, 2.8 the others" in told
    assert "the better one is longer in 50.0%, shorter in 25.0%" in told
    assert f"sharing     {answers.stored} tokens where shared prompts stand once" in told
    assert not any("length bias" in note for note in prepared.audit.notes)
    biased = made(tmp_path, text, rows[:2]).audit
    assert any("the better answer is longer in 100.0% of pairs" in note for note in biased.notes)


def test_answers_that_differ_in_text_alone_are_dropped(tmp_path: Path, text: Text):
    trimmed = opened(tmp_path / "trimmed", CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"))
    audit = made(tmp_path, trimmed, [pair("q", "yes", "yes "), pair("q", "yes", "no")]).audit
    assert audit.dropped["same_tokens"].rows == (0,)
    assert audit.rows_out == 1


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([pair("q", "r" * 90, "s")], {"max_length": 32}, r"no row of .* is left to train on: too_long 1 row: .*:1"),
        (
            [pair("q", "r", "s"), pair("q", "r" * 90, "s")],
            {"max_length": 64, "too_long": "error"},
            r"more tokens than data\.max_length=64 in 1 row: .*:2; write data\.max_length=\d+, or data\.too_long=drop",
        ),
        (
            [pair("q", "r" * 30, "s" * 30)],
            {"max_length": 64, "too_long": "error", "budget": 64},
            r"more tokens than a micro-batch of 64 takes in 1 row: .*:1; write run\.microbatch_tokens=\d+, or",
        ),
        (
            [pair("q", "r", "s")],
            {"too_long": "split"},
            r"data\.too_long=split would cut answers .*: write data\.too_lo",
        ),
        ([pair("q", "r", "s")], {"train_on": "everything"}, r"write data\.train_on=all_assistant or last_assistant"),
        (
            [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}],
            {},
            r"reads as messages .*examples and not pairs of answers.*: train on them with `burnish sft`",
        ),
        ([{"prompt": "q"}], {}, r"reads as prompt .*prompts and not pairs of answers"),
        ([judged("q", "r", True)], {}, r"reads as judged .*: train on them with `burnish dpo loss=kto`"),
        ([{"text": "q"}], {"kind": "labels"}, r"reads as text .*examples and not answers with labels"),
        (
            [{"prompt": "q", "answers": ["a", "b", "c"], "ranks": [1, 2, 3]}],
            {"kind": "labels"},
            r"rows\.jsonl:1: 3 ranked answers do not say which of them are wanted: write rows of `prompt`",
        ),
        ([judged("q", "r", True)] * 2, {"kind": "labels"}, r"left to train on: unmatched 2 rows"),
        ([pair("q", "r", "s"), {"prompt": "q", "chosen": "r"}], {}, r"rows\.jsonl:2: the data reads as prompt_chosen"),
        (
            [{"prompt": "q", "chosen": [{"role": "assistant", "content": "r", "weight": 0}], "rejected": "s"}],
            {},
            r"an answer with nothing to train on .* in 1 row: .*:1; write data\.allow_untrained=true",
        ),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, text: Text, rows: list[Any], settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message) as caught:
        made(tmp_path, text, rows, **settings)
    assert "\n" not in str(caught.value)


def test_a_comparison_over_the_budget_is_dropped_whole(tmp_path: Path, text: Text):
    rows = [pair("q", "r" * 30, "s" * 30), pair("q", "r", "s")]
    prepared = made(tmp_path, text, rows, max_length=64, budget=64)
    assert prepared.audit.dropped["over_budget"].rows == (0,)
    assert len(prepared.train) == 1


def test_rows_are_held_out_by_prompt(tmp_path: Path, text: Text):
    rows = [pair(f"q{k % 20}", f"yes {k}", f"no {k}", task=f"t{k % 2}") for k in range(60)]
    prepared = made(tmp_path, text, rows, EvaluateSettings(fraction=0.2, prompts=3))
    held = {rows[comparison.sequences[0].row]["prompt"] for comparison in prepared.held_out}
    trained = {rows[comparison.sequences[0].row]["prompt"] for comparison in prepared.train}
    assert (len(prepared.held_out), len(prepared.train)) == (12, 48)
    assert not held & trained
    assert prepared.audit.held_out.rows == 12
    # Each prompt once, with the better answer as its reference; the families of tasks in turn.
    assert len(prepared.prompts) == 3
    assert {prompt.messages[0].content for prompt in prepared.prompts} <= held
    assert all((prompt.answer or "").startswith("yes ") for prompt in prepared.prompts)
    assert len({prompt.messages[0].content for prompt in prepared.prompts}) == 3


def test_evaluation_rows_may_be_pairs_examples_or_prompts(tmp_path: Path, text: Text):
    rows = [pair("q0", "yes", "no")]
    held = write(tmp_path / "held.jsonl", [pair("q0", "yes", "never"), pair("new", "yes", "no")])
    prepared = made(tmp_path, text, rows, EvaluateSettings(path=held, prompts=5))
    assert [comparison.sequences[0].row for comparison in prepared.held_out] == [1]
    assert prepared.audit.held_out.dropped["also_in_training"].rows == (0,)
    assert [prompt.answer for prompt in prepared.prompts] == ["yes"]
    for other in (
        {"prompt": "new", "answer": "yes"},
        {"messages": [{"role": "user", "content": "new"}, {"role": "assistant", "content": "yes"}]},
    ):
        prepared = made(
            tmp_path, text, rows, EvaluateSettings(path=write(tmp_path / "other.jsonl", [other]), prompts=5)
        )
        assert len(prepared.held_out) == 0
        assert [(prompt.messages[0].content, prompt.answer) for prompt in prepared.prompts] == [("new", "yes")]
    labels = write(tmp_path / "labels.jsonl", [judged("new", "yes", True)])
    with pytest.raises(ValueError, match=r"evaluate\.path=.*labels\.jsonl reads as judged"):
        made(tmp_path, text, rows, EvaluateSettings(path=labels))


LABELLED = [judged(f"question {k}", f"answer {k}", k % 3 == 0) for k in range(12)]


def test_each_labelled_answer_has_an_answer_to_another_prompt_beside_it(tmp_path: Path, text: Text):
    prepared = made(tmp_path, text, LABELLED, kind="labels")
    partners: list[str] = []
    for row, comparison in zip(LABELLED, prepared.train, strict=True):
        own, other = (written(sequence, text[0]) for sequence in comparison.sequences)
        assert own == (asked(row["prompt"]), f"{row['completion']}<|im_end|>")
        assert other[0] == asked(row["prompt"])
        partners.append(other[1])
        assert comparison.labels == (1 if row["label"] else -1, 0)
        assert comparison.pairs == ()
    # Every answer stands beside one other prompt: a permutation without a fixed point.
    answers = [f"{row['completion']}<|im_end|>" for row in LABELLED]
    assert sorted(partners) == sorted(answers)
    assert all(a != b for a, b in zip(partners, answers, strict=True))
    told = prepared.audit.answers
    assert told is not None
    assert (told.wanted, told.unwanted, told.mismatched, told.pairs) == (4, 8, 12, 0)
    assert "4 wanted and 8 unwanted answers" in "\n".join(prepared.audit.lines())
    data = DataSettings(path=str(tmp_path / "rows.jsonl"))
    again, other = (prepare_preferences(data, NONE, *text, seed=seed, kind="labels") for seed in (0, 1))
    assert list(again.train) == list(prepared.train)
    assert list(other.train) != list(prepared.train)


def test_an_answer_to_the_same_prompt_is_no_mismatch(tmp_path: Path, text: Text):
    rows = [judged("q", f"answer {k}", True) for k in range(8)] + [judged("other", "stranger", False)]
    prepared = made(tmp_path, text, rows, kind="labels")
    others = [written(comparison.sequences[1], text[0])[1] for comparison in prepared.train]
    assert others[:8] == ["stranger<|im_end|>"] * 8
    assert others[8] != "stranger<|im_end|>"


def test_a_mismatch_that_would_be_too_long_is_passed_over(tmp_path: Path, text: Text):
    rows = [judged("q" * 30, "a", True), judged("p", "b" * 40, False), judged("r", "c", True)]
    prepared = made(tmp_path, text, rows, kind="labels", max_length=64)
    assert prepared.train.longest <= 64
    beside = {c.sequences[0].row: written(c.sequences[1], text[0])[1] for c in prepared.train}
    assert beside[0] == "c<|im_end|>"  # its own prompt with b... would have more than 64 tokens


def test_pairs_are_one_wanted_and_one_unwanted_answer(tmp_path: Path, text: Text):
    rows = [pair(f"q{k}", f"yes {k}", f"no {k}") for k in range(4)]
    prepared = made(tmp_path, text, rows, kind="labels")
    for k, comparison in enumerate(prepared.train):
        said = [written(sequence, text[0]) for sequence in comparison.sequences]
        assert comparison.labels == (1, -1, 0, 0)
        assert [before for before, _ in said] == [asked(f"q{k}")] * 4
        assert [after for _, after in said[:2]] == [f"yes {k}<|im_end|>", f"no {k}<|im_end|>"]
        assert said[2][1].startswith("yes ")
        assert said[3][1].startswith("no ")
        assert said[2][1] != said[0][1]


def test_a_second_time_comes_from_the_cache(tmp_path: Path, text: Text):
    rows = [pair(f"q{k}", f"yes {k}", f"no {k}", margin=k) for k in range(10)]
    evaluate = EvaluateSettings(fraction=0.2, prompts=2)
    first, again = (made(tmp_path, text, rows, evaluate) for _ in range(2))
    assert (first.cached, again.cached) == (False, True)
    assert list(first.train) == list(again.train)
    assert list(first.held_out) == list(again.held_out)
    assert (first.prompts, first.audit) == (again.prompts, again.audit)
    assert not made(tmp_path, text, rows, evaluate, kind="labels").cached
    assert not made(tmp_path, text, rows, evaluate, budget=5000).cached
    assert not made(tmp_path, text, [*rows, pair("new", "yes", "no")], evaluate).cached


def test_the_embedded_data_has_pairs_and_prompts_held_out(text: Text):
    data = DataSettings(path="embedded", limit=30)
    prepared = prepare_preferences(data, EvaluateSettings(prompts=40), *text, seed=0)
    assert prepared.audit.format == "prompt_chosen_rejected"
    assert (len(prepared.train), prepared.audit.rows_in) == (30, 30)
    assert "preferences_held_out" in prepared.audit.held_out.how
    assert len(prepared.prompts) == len(prepared.held_out) == 30
    assert all(prompt.answer and prompt.task for prompt in prepared.prompts)


def test_progress_hears_of_every_row(tmp_path: Path, text: Text):
    path = write(tmp_path / "rows.jsonl", [pair(f"q{k}", "yes", "no") for k in range(10)])
    heard: list[tuple[int, int]] = []
    prepare_preferences(
        DataSettings(path=path),
        EvaluateSettings(fraction=0.2),
        *text,
        seed=0,
        progress=lambda done, rows: heard.append((done, rows)),
    )
    assert heard == [(k + 1, 10) for k in range(10)]
