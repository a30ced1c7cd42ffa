import json
from pathlib import Path
from typing import Any

from burnish.report.curves import draw_curves
from burnish.report.folders import read_run
from tests.unit.report.folders import bare_run


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
