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
        "| method           |    trainable |   memory | time (× full) |  loss | accuracy | forgetting |",
        "| ---------------- | -----------: | -------: | ------------: | ----: | -------: | ---------: |",
        "| Base model       |            – |        – |             – | 3.000 |     1.0% |          – |",
        "| Full fine-tuning | 1.00k (100%) | 1.00 MiB |  40 s (1.00×) | 0.500 |    87.5% |     +0.250 |",
        "| LoRA             |    50 (5.0%) | 1.00 MiB |  20 s (0.50×) | 0.625 |    87.5% |     −0.100 |",
    ]


def test_columns_without_data_are_left_out() -> None:
    bare = {"method": "LoRA", "metrics": {}, "before": {}}
    assert table([bare]) == "| method |\n| ------ |\n| LoRA   |"
    names, found = columns([row("LoRA", before=BEFORE, metrics={})])
    assert names == ["Base model", "LoRA"]
    assert [column.short for column in found] == ["trainable", "memory", "time", "loss", "accuracy"]
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
    assert best["loss"] == (False, False, True)
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


SFT = {"eval_loss": 7.55, "eval_general_loss": 2.0, "eval_exact_match_seen": 0.0, "eval_exact_match_unseen": 0.0}


def after(seen: float, general: float, **more: float) -> dict[str, float]:
    shared = {"eval_general_loss": general, "eval_exact_match_seen": seen, "eval_exact_match_unseen": seen - 0.1}
    return {**shared, **more}


def preference_rows() -> list[dict[str, Any]]:
    """What the demo compares: three ways of fine-tuning, and three of learning from preferences after one of them."""
    lora = after(0.914, 2.066, eval_loss=0.295)
    start = after(0.914, 2.066, eval_reward=0.844, eval_kl=0.0, eval_win_rate=0.5)
    dpo = after(0.934, 2.14, eval_reward=0.912, eval_kl=13.214, eval_win_rate=0.63, eval_accuracy=0.913, eval_loss=0.3)
    ppo = after(0.94, 2.09, eval_reward=-0.93, eval_kl=1.2, eval_win_rate=0.615)
    scored: dict[str, Any] = {"from": "lora", "scorer": "the embedded world"}
    pairs = {"before": {"eval_accuracy": 0.5, "eval_loss": 0.7}, "metrics": {"eval_accuracy": 0.951, "eval_loss": 0.2}}
    size: dict[str, Any] = {"trainable_parameters": 4_213_000, "total_parameters": 4_586_000}
    size |= {"peak_memory_bytes": 158 * 2**20, "seconds": 100.0}
    return [
        row("Full fine-tuning", run="full", before=SFT, metrics=after(0.907, 2.173, eval_loss=0.248), **size),
        row("LoRA", before=SFT, metrics=lora, **size),
        row("QLoRA", before=SFT, metrics=after(0.886, 2.073, eval_loss=0.331), **size),
        row("LoRA + DPO", before=start | {"eval_accuracy": 0.5}, metrics=dpo, **size, **scored),
        row("LoRA + reward model", **pairs, **size, **{"from": "lora"}),
        row("LoRA + PPO", before=start, metrics=ppo, **size, **scored),
    ]


def test_six_methods_are_read_in_a_terminal() -> None:
    lines = table(preference_rows()).splitlines()
    assert max(map(len, lines)) <= 160
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    assert [line[0] for line in cells] == ["method", "Base model", *(row["method"] for row in preference_rows())]
    assert [line[4:] for line in cells] == [
        ["loss", "seen acc.", "unseen acc.", "reward", "KL", "wins vs LoRA", "pairs", "forgetting"],
        ["7.550", "0.0%", "0.0%", "–", "–", "–", "–", "–"],
        ["0.248", "90.7%", "80.7%", "–", "–", "–", "–", "+0.173"],
        ["0.295", "91.4%", "81.4%", "0.844", "–", "–", "–", "+0.066"],
        ["0.331", "88.6%", "78.6%", "–", "–", "–", "–", "+0.073"],
        ["–", "93.4%", "83.4%", "0.912", "13.21", "63.0%", "91.3%", "+0.140"],
        ["–", "–", "–", "–", "–", "–", "95.1%", "–"],
        ["–", "94.0%", "84.0%", "−0.930", "1.20", "61.5%", "–", "+0.090"],
    ]


def test_runs_that_started_from_one_that_is_not_there_share_its_line() -> None:
    names, found = columns(preference_rows()[3:])
    assert names == ["Start (lora)", "LoRA + DPO", "LoRA + reward model", "LoRA + PPO"]
    cells = {column.short: column.cells for column in found}
    assert cells["reward"] == ("0.844", "0.912", "–", "−0.930")
    assert cells["KL"][0] == cells["wins vs lora"][0] == "–"
    assert cells["forgetting"] == ("–", "+0.074", "–", "+0.024")


def test_rewards_of_different_sources_have_columns_of_their_own() -> None:
    one, other = preference_rows()[3], preference_rows()[5] | {"scorer": "reward.path=runs/rm"}
    cells = {column.short: column.cells for column in columns([one, other])[1]}
    assert cells["reward (the embedded world)"][1:] == ("0.912", "–")
    assert cells["reward (reward.path=runs/rm)"][1:] == ("–", "−0.930")


def test_wins_are_against_who_each_run_started_from() -> None:
    full, lora, _, dpo, _, ppo = preference_rows()
    titles = [column.title for column in columns([full, lora, dpo | {"from": "full"}, ppo])[1]]
    assert "win rate against start" in titles
    assert "win rate against full" in [column.title for column in columns([full, dpo | {"from": "full"}])[1]]


def test_forgetting_adds_up_along_a_chain_of_runs() -> None:
    first = row("A", before={"eval_general_loss": 2.0}, metrics={"eval_general_loss": 2.25})
    second = row("B", before={"eval_general_loss": 2.25}, metrics={"eval_general_loss": 2.5}, **{"from": "a"})
    third = row("C", before={"eval_general_loss": 2.5}, metrics={"eval_general_loss": 2.125}, **{"from": "b"})
    assert columns([first, second, third])[1][-1].cells == ("–", "+0.250", "+0.500", "+0.125")
    assert columns([second, third])[1][-1].cells == ("–", "+0.250", "−0.125")
