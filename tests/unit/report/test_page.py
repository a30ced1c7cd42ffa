# ruff: noqa: RUF001 - the signs of typography are meant
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from burnish.data.audit import Answers
from burnish.report.page import write_page
from burnish.report.settings import side_by_side
from burnish.report.verdicts import Model, clipped, pair_samples, task_groups
from tests.unit.report.folders import LATER, METHODS, NASTY, UNSEEN, audit, bare_run, finished_run, later_run

VOID = {"meta", "br", "wbr", "path", "rect", "circle"}


class Reader(HTMLParser):
    """Reads a page strictly: every element is closed in order; keeps text by element and all attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.handle_data(" ")  # neighbouring elements are different words
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    runs = [finished_run(folder / kind, kind, steps=200) for kind in METHODS]
    return write_page(runs, folder / "report.html", 'Full & "LoRA"').read_text(encoding="utf-8")


def test_the_page_is_well_formed_small_and_points_at_nothing_outside(page: str) -> None:
    read = Reader(page)
    assert len(page.encode()) < 100_000
    links = [value for _, name, value in read.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert links
    ids = {value for _, name, value in read.attributes if name == "id"}
    assert {link.removeprefix("#") for link in links} <= ids
    assert not re.search(r"@import|url\(", read.texts["style"][0])
    assert "script" not in read.texts
    assert read.texts["h1"] == ['Full & "LoRA"']


def test_the_page_says_what_was_compared_and_what_came_of_it(page: str) -> None:
    said = Reader(page).texts["p"][1:3]
    assert said[0] == (
        "3 runs from the embedded base (3.41M parameters) on the embedded data, 410k tokens each, on cpu (2 threads)."
    )
    assert said[1] == (
        "Accuracy on held-out prompts of seen families: 0.8% before; "
        "86.0% with full fine-tuning, 82.0% with LoRA and 80.0% with QLoRA."
    )


def test_what_models_and_data_say_is_shown_as_text(page: str) -> None:
    assert NASTY not in page
    assert (
        page.count(html.escape(NASTY, quote=False).replace('"', "&#34;")) == 2
    )  # a prompt, and an example in the audit


def test_samples_stand_side_by_side_with_their_verdicts_in_words(page: str) -> None:
    texts = [" ".join(text.split()) for text in Reader(page).texts["article"]]
    assert texts[1] == (
        "add What is 38 plus 47? Reference 85 Base model no answer ✗ wrong "
        "Full fine-tuning 85 ✓ right LoRA 85 ✓ right QLoRA 75 ✗ wrong"
    )
    assert len(texts) == 24


def test_the_page_shows_settings_that_differ_apart_from_those_that_do_not(page: str) -> None:
    rows = [" ".join(text.split()) for text in Reader(page).texts["tr"]]
    assert "model.storage full bf16 nf4" in rows
    assert "optim.lr 2e-05 0.0002 0.0002" in rows
    pairs = [" ".join(text.split()) for text in Reader(page).texts["div"]]
    assert "packages.torch 2.13.0" in pairs
    assert "data.max_length 512" in pairs


def test_a_run_that_left_next_to_nothing_has_a_page(tmp_path: Path) -> None:
    page = write_page([bare_run(tmp_path / "bare")], tmp_path / "report.html", "Bare").read_text()
    read = Reader(page)
    assert [" ".join(text.split()) for text in read.texts["tr"]][1:] == ["LoRA 10 (1.0%) 2.00 KiB 1.0 s"]
    assert {text.strip() for text in read.texts["h2"]} == {"Results", "Settings and environment"}
    assert "no data" not in page


def test_a_long_run_makes_no_long_page_and_other_metrics_are_drawn_too(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "long")
    lines = [{"step": i, "loss": float("nan") if i == 7 else 2.0, "rewards/margin": i / 4000} for i in range(1, 4001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4001, "lo')
    page = write_page([run], tmp_path / "report.html", "Long").read_text()
    assert len(page) < 25_000
    assert [text.strip() for text in Reader(page).texts["figcaption"]] == ["Training loss", "rewards/margin"]
    assert "nan" not in page


def test_samples_are_matched_by_task_and_prompt() -> None:
    def verdict(*samples: tuple[str, str, str]) -> Model:
        made = [{"task": t, "prompt": p, "reference": "r", "answer": a, "correct": a == "r"} for t, p, a in samples]
        return Model("m", "s0", {"samples": made})

    found = pair_samples([verdict(("x", "p", "r"), ("y", "p", "no")), verdict(("y", "p", "r")), Model("m", "s1", {})])
    assert [(s.task, [(a.text, a.correct) for a in s.answers]) for s in found] == [
        ("x", [("r", True)]),
        ("y", [("no", False), ("r", True)]),
    ]
    assert clipped("a" * 30, 10) == "a" * 10 + " … [20 more characters]"


def test_tasks_are_grouped_and_means_are_over_whole_groups_only() -> None:
    models = [
        Model(
            "a",
            "s0",
            {"by_task": {"add": 1.0, "sort": 0.5, UNSEEN[0]: 0.25}, "metrics": {"eval_exact_match_unseen": 0.25}},
        ),
        Model("b", "s1", {"by_task": {"add": 0.5}}),
    ]
    seen, unseen = task_groups(models)
    assert seen.tasks == [("add", [1.0, 0.5]), ("sort", [0.5, None])]
    assert (seen.mean, unseen.mean) == ([0.75, None], [None, None])
    assert unseen.tasks == [(UNSEEN[0], [0.25, None])]
    assert [group.title for group in task_groups(models[1:])] == [""]
    assert task_groups([Model("c", "s0", {})]) == []


def test_settings_side_by_side() -> None:
    found = side_by_side(
        [{"a": {"b": 1, "c": None}, "t": ["x", "y"]}, {"a": {"b": 2, "c": None}, "t": ["x", "y"], "n": True}]
    )
    assert found.different == [("a.b", ["1", "2"]), ("n", ["–", "true"])]
    assert found.shared == [("a.c", "none"), ("t", "x, y")]


def test_the_page_of_learning_from_preferences(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "lora", "lora"), *(later_run(tmp_path / kind, kind) for kind in LATER)]
    page = write_page(runs, tmp_path / "report.html", "Preferences").read_text(encoding="utf-8")
    read = Reader(page)
    assert read.texts["p"][1:4] == [
        "4 runs from the embedded base (3.41M parameters) on the embedded data, on cpu (2 threads).",
        "Accuracy on held-out prompts of seen families: 0.8% before; 82.0% with LoRA, 82.0% with LoRA + DPO and 82.0% "
        "with LoRA + PPO.",
        "Against LoRA, on held-out prompts, ties half: LoRA + DPO wins 63.0% (3.21 nats away) and LoRA + PPO wins "
        "61.5% (1.24 nats away).",
    ]
    rows = [" ".join(text.split()) for text in read.texts["tr"]]
    assert "length_correlation – −0.31 −0.31 –" in rows
    assert "pair_loss – 0.21 0.21 –" in rows
    assert len(page.encode()) < 150_000


def test_answers_that_were_scored_show_what_they_are_worth_and_ungraded_ones_no_verdict(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run")
    sample = {"task": None, "prompt": "Hi", "reference": None, "answer": "Hello", "correct": None, "reward": -1.5}
    (run / "after.json").write_text(json.dumps({"metrics": {}, "samples": [sample]}))
    page = write_page([run], tmp_path / "report.html", "Scored").read_text()
    assert "reward −1.50" in [text.strip() for text in Reader(page).texts["dd"]]
    assert "wrong" not in Reader(page).texts["article"][0]


def test_the_account_of_compared_answers_is_shown(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run")
    answers = Answers(120, 4, 8.0, 13.5, longer=0.25, shorter=0.7, stored=900)
    (run / "audit.json").write_text(json.dumps(replace(audit(), answers=answers).as_dict()))
    said = Reader(write_page([run], tmp_path / "report.html", "Pairs").read_text()).texts["dd"]
    assert "120, 4 with a margin; the better answer is longer in 25.0%, shorter in 70.0%" in said
