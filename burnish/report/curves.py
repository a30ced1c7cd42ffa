"""Which curves of metrics.jsonl the page draws, and the series that go into them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.report.charts import Point, Series, extremes, line_chart, smooth, thin
from burnish.report.folders import RunFolder

MOST_POINTS = 100
"""Points of a line in the page: more than the eye sees at its width."""

SMOOTH_FROM = 30
"""Runs with fewer points than this are drawn as they are."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart and what is written above it."""

    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class Curves:
    """The figures of a page, most telling first."""

    main: list[Figure]
    steps: list[Figure]
    """How the steps went: learning rate, gradient norm, speed."""
    more: list[Figure]
    """Whatever else a method logged."""
    smoothed: int
    """Over how many steps, about, the smoothed lines average; 0 when none is smoothed."""


def draw_curves(runs: Sequence[RunFolder], names: Sequence[str]) -> Curves:
    """Every curve that some run has points for, all runs in one picture."""
    logged = {name for run in runs for line in run.metrics for name, value in line.items() if _is_number(value)}
    others = {name: name for name in sorted(logged - TRAINED.keys() - HELD_OUT.keys() - STEPS.keys() - AXES)}
    longest = max((_span(_logged(run, "loss")) for run in runs), default=1)
    return Curves(
        main=_figures(TRAINED, runs, names) + _figures(HELD_OUT, runs, names),
        steps=_figures(STEPS, runs, names, small=True),
        more=_figures(others, runs, names, small=True),
        smoothed=longest if longest > 1 else 0,
    )


def _figures(
    titles: dict[str, str], runs: Sequence[RunFolder], names: Sequence[str], small: bool = False
) -> list[Figure]:
    """A figure for each metric that some run has a finite value of."""
    width, height = (280, 170) if small else (400, 230)
    found: list[Figure] = []
    for key, title in titles.items():
        series = [line for i, run in enumerate(runs) for line in _series(run, key, names[i], i)]
        if any(math.isfinite(y) for line in series for _, y in line.points):
            found.append(Figure(title, line_chart(series, title, width=width, height=height)))
    return found


def _series(run: RunFolder, key: str, name: str, style: int) -> list[Series]:
    """The lines of one run: smoothed, as logged, or with dots where it was measured now and then."""
    if key in HELD_OUT:
        return [Series(name, tuple(thin(_held_out(run, key), MOST_POINTS)), style, dots=True)]
    points = _logged(run, key, without="eval_loss" if key == "tokens_per_second" else None)
    if key not in SMOOTHED or _span(points) == 1:
        return [Series(name, tuple(thin(points, MOST_POINTS)), style)]
    line = thin(smooth(points, _span(points)), MOST_POINTS)
    return [Series(name, tuple(line), style), Series(name, tuple(extremes(points, MOST_POINTS)), style, faint=True)]


def _span(points: Sequence[Point]) -> int:
    """Over how many points a line is smoothed: an odd number, 1 for a short line."""
    return len(points) // 40 * 2 + 3 if len(points) >= SMOOTH_FROM else 1


def _logged(run: RunFolder, name: str, without: str | None = None) -> list[Point]:
    """A metric by step; `without` leaves out lines that hold that other one (an evaluation slows its step down)."""
    lines = [line for line in run.metrics if "step" in line and without not in line]
    return [(line["step"], line[name]) for line in lines if _is_number(line.get(name))]


def _held_out(run: RunFolder, name: str) -> list[Point]:
    """What was measured during the run, with the verdicts before the first and after the last step."""
    points = _logged(run, name)
    start, end = run.row.get("before", {}).get(name), run.row.get("metrics", {}).get(name)
    last = max((line["step"] for line in run.metrics if "step" in line), default=None)
    if _is_number(start):
        points.insert(0, (0, start))
    if _is_number(end) and last is not None and (not points or points[-1][0] < last):
        points.append((last, end))
    return points


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


TRAINED = {"loss": "Training loss", "mean_token_accuracy": "Token accuracy in training"}
HELD_OUT = {"eval_loss": "Held-out loss", "eval_general_loss": "Loss on general text"}
STEPS = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_second": "Tokens per second"}
SMOOTHED = {"loss", "mean_token_accuracy", "grad_norm", "tokens_per_second"}
AXES = {
    "tokens",
    "step",
    "num_tokens",
    "seconds",
    "memory_bytes",
    "eval_perplexity",
    "eval_mean_token_accuracy",
    "eval_num_tokens",
}
"""Other axes, and what says the same as a curve that is drawn."""
