# ruff: noqa: RUF001 - the signs of typography are meant
from typing import Any

import pytest

from burnish.report.folders import labels
from burnish.report.table import bases, columns, forgetting, table


def row(method: str, **values: Any) -> dict[str, Any]:
    plain = {"trainable_parameters": 50, "total_parameters": 1000, "peak_memory_bytes": 2**20, "seconds": 20.0}
    return {"method": method, **plain, "metrics": {}, "before": {}, "run": method.lower(), **values}


BEFORE = {"eval_loss": 3.0, "eval_general_loss": 2.0, "eval_exact_match": 0.01}
AFTER = {"eval_loss": 0.5, "eval_general_loss": 2.25, "eval_exact_match": 0.875}


def test_the_table_as_it_reads() -> None:
    full = row("Full fine-tuning", trainable_parameters=1000, seconds=40.0, before=BEFORE, metrics=AFTER)
    lora = row("LoRA", before=BEFORE, metrics=AFTER | {"eval_loss": 0.625, "eval_general_loss": 1.9})
    assert table([full, lora]).splitlines() == [
        "| method           |    trainable | peak memory | time (× full) | held-out loss | accuracy | forgetting |",
        "| ---------------- | -----------: | ----------: | ------------: | ------------: | -------: | ---------: |",
        "| Base model       |            – |           – |             – |         3.000 |     1.0% |          – |",
        "| Full fine-tuning | 1.00k (100%) |    1.00 MiB |  40 s (1.00×) |         0.500 |    87.5% |     +0.250 |",
        "| LoRA             |    50 (5.0%) |    1.00 MiB |  20 s (0.50×) |         0.625 |    87.5% |     −0.100 |",
    ]


def test_columns_without_data_are_left_out() -> None:
    bare = {"method": "LoRA", "metrics": {}, "before": {}}
    assert table([bare]) == "| method |\n| ------ |\n| LoRA   |"
    names, found = columns([row("LoRA", before=BEFORE, metrics={})])
    assert names == ["Base model", "LoRA"]
    assert [column.short for column in found] == ["trainable", "peak memory", "time", "held-out loss", "accuracy"]
    assert found[3].cells == ("3.000", "–")


def test_accuracy_is_by_family_where_families_were_told_apart_and_of_tokens_where_no_prompt_was_answered() -> None:
    split = {"eval_exact_match": 0.5, "eval_exact_match_seen": 0.75, "eval_exact_match_unseen": 0.25}
    shorts = [column.short for column in columns([row("LoRA", metrics=split)])[1]]
    assert shorts[-2:] == ["seen acc.", "unseen acc."]
    tokens = columns([row("LoRA", metrics={"eval_mean_token_accuracy": 0.5})])[1][-1]
    assert (tokens.short, tokens.cells) == ("token acc.", ("50.0%",))


def test_the_best_of_several_runs_is_marked() -> None:
    _, found = columns(
        [row("A", before=BEFORE, metrics=AFTER), row("B", metrics={"eval_loss": 0.4, "eval_exact_match": 0.875})]
    )
    best = {column.short: column.best for column in found}
    assert best["held-out loss"] == (False, False, True)
    assert best["trainable"] == best["accuracy"] == (False, False, False)
    assert not any(any(column.best) for column in columns([row("A", metrics=AFTER)])[1])


def test_runs_that_read_the_same_are_equally_good() -> None:
    rows = [row(name, metrics={"eval_exact_match": share}) for name, share in (("A", 0.5), ("B", 0.50001), ("C", 0.4))]
    assert columns(rows)[1][-1].best == (True, True, False)


def test_runs_share_a_base_line_unless_they_started_elsewhere() -> None:
    rounded = row("QLoRA", before=BEFORE | {"eval_loss": 3.09})
    other = row("DoRA", before=BEFORE | {"eval_loss": 2.0})
    assert [base.run for base in bases([row("X"), row("LoRA", before=BEFORE), rounded])] == [1]
    assert [base.label for base in bases([rounded, other])] == ["Base model of QLoRA", "Base model of DoRA"]
    assert bases([row("X")]) == []


def test_runs_of_one_method_are_told_apart() -> None:
    assert labels([row("LoRA", run="r8"), row("LoRA", run="r16"), row("QLoRA")]) == ["LoRA (r8)", "LoRA (r16)", "QLoRA"]
    assert labels([row("LoRA", run="a"), row("LoRA", run="a")]) == ["LoRA (1)", "LoRA (2)"]


def test_a_name_cannot_break_the_table() -> None:
    assert table([row("a|b\nc")]).splitlines()[2].startswith(r"| a\|b c ")


@pytest.mark.parametrize(("before", "after", "rise"), [(BEFORE, AFTER, 0.25), ({}, AFTER, None), (BEFORE, {}, None)])
def test_forgetting(before: dict[str, float], after: dict[str, float], rise: float | None) -> None:
    assert forgetting(before, after) == rise
