import json
from pathlib import Path
from typing import Any

from burnish.report.curves import draw_curves
from burnish.report.folders import read_run
from tests.unit.report.folders import LATER, bare_run, finished_run, later_run


def described(folder: Path, lines: list[dict[str, Any]], **row: Any) -> dict[str, str]:
    """Title -> the chart in words, for a run with these lines of metrics."""
    run = bare_run(folder, **row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = draw_curves([read_run(run)], ["LoRA"])
    figures = [*curves.main, *curves.steps, *curves.more]
    return {figure.title: figure.svg.split('aria-label="')[1].split('"')[0] for figure in figures}


def test_held_out_curves_begin_and_end_with_the_verdicts(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}, {"step": 3, "loss": 1.0}]
    ends = {"before": {"eval_loss": 4.0, "eval_general_loss": 2.0}, "metrics": {"eval_loss": 1.5}}
    assert described(tmp_path / "run", lines, **ends) == {
        "Training loss": "Training loss: LoRA from 3 to 1",
        "Held-out loss": "Held-out loss: LoRA from 4 to 1.5",
        "Loss on general text": "Loss on general text: LoRA from 2 to 2",
    }


def test_speed_is_that_of_steps_without_an_evaluation(tmp_path: Path) -> None:
    speeds = [{"step": i, "tokens_per_second": rate} for i, rate in ((1, 500), (2, 510), (3, 20))]
    speeds[2]["eval_loss"] = 2.0
    assert described(tmp_path / "run", speeds)["Tokens per second"] == "Tokens per second: LoRA from 500 to 510"


def test_a_metric_that_was_never_finite_is_not_drawn(tmp_path: Path) -> None:
    assert described(tmp_path / "run", [{"step": 1, "loss": float("inf"), "note": "text", "flag": True}]) == {}


def test_losses_of_different_kinds_are_not_drawn_together(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "lora", "lora"), *(later_run(tmp_path / kind, kind) for kind in LATER)]
    names = ["LoRA", "DPO", "reward", "PPO"]
    curves = draw_curves([read_run(run) for run in runs], names)
    titles = {figure.title: figure.svg.split('aria-label="')[1].split('"')[0] for figure in curves.main}

    def drawn(title: str) -> list[str]:
        return [name for name in names if f"{name} from" in titles[title]]

    assert drawn("Training loss") == ["LoRA"]
    assert drawn("Training loss, of pairs") == drawn("Pairs ranked right in training") == ["DPO", "reward"]
    assert drawn("Loss of the policy") == drawn("Reward of the answers") == ["PPO"]
    assert drawn("Held-out reward") == ["PPO"], "two points alone are in the table"
    small = [figure.title for figure in curves.steps]
    assert {"Entropy of a token, in nats", "Variance that values explain", "Share of ratios that were clipped"} <= {
        *small
    }
    assert [figure.title for figure in curves.more] == ["ratio"]


def test_a_reward_that_is_not_trained_on_is_drawn_beside_the_one_that_is(tmp_path: Path) -> None:
    rise_and_fall = [0.0, 0.5, 1.0, 0.75]
    lines = [{"step": i, "reward": 3.0 * i, "eval_reward": 2 + y / 10} for i, y in enumerate(rise_and_fall, 1)]
    title = "Gain in the reward trained on, and (dots) in one that is not; 1 is the largest"
    found = described(tmp_path / "gold", lines, scorer="the embedded world")[title]
    assert found.endswith("LoRA, trained on from 0 to 1; LoRA, not trained on from 0 to 0.75")
    assert title not in described(tmp_path / "same", lines, scorer="reward.path=runs/rm")
