"""Which curves of metrics.jsonl the page draws, and the series that go into them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.report.charts import Point, Series, line_chart, smooth, thin
from burnish.report.folders import RunFolder

MOST_POINTS = 160
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
    others = sorted(logged - TRAINED.keys() - HELD_OUT.keys() - STEPS.keys() - AXES)
    spans = [_span(_logged(run, "loss")) for run in runs]
    return Curves(
        main=[
            *_figures(TRAINED, [[_logged(r, key) for r in runs] for key in TRAINED], names, smoothed=True),
            *_figures(HELD_OUT, [[_held_out(r, key) for r in runs] for key in HELD_OUT], names, dots=True),
        ],
        steps=_figures(STEPS, [[_logged(r, key) for r in runs] for key in STEPS], names, small=True),
        more=_figures({k: k for k in others}, [[_logged(r, key) for r in runs] for key in others], names, small=True),
        smoothed=round(max(spans, default=0)) if max(spans, default=0) > 1 else 0,
    )


def _figures(
    titles: dict[str, str],
    points: Sequence[Sequence[Sequence[Point]]],
    names: Sequence[str],
    smoothed: bool = False,
    dots: bool = False,
    small: bool = False,
) -> list[Figure]:
    """A figure for each title that has a finite point; points are by title, then by run."""
    width, height = (280, 170) if small else (400, 230)
    found: list[Figure] = []
    for title, lines in zip(titles.values(), points, strict=True):
        series = [s for i, line in enumerate(lines) if line for s in _series(line, names[i], i, smoothed, dots)]
        if any(math.isfinite(y) for line in series for _, y in line.points):
            found.append(Figure(title, line_chart(series, title, width=width, height=height)))
    return found


def _series(points: Sequence[Point], name: str, style: int, smoothed: bool, dots: bool) -> list[Series]:
    if not smoothed or len(points) < SMOOTH_FROM:
        return [Series(name, tuple(thin(points, MOST_POINTS)), style, dots=dots)]
    line = thin(smooth(points, _span(points)), MOST_POINTS)
    return [Series(name, tuple(line), style), Series(name, tuple(thin(points, MOST_POINTS)), style, faint=True)]


def _span(points: Sequence[Point]) -> float:
    return len(points) / 25 if len(points) >= SMOOTH_FROM else 1.0


def _logged(run: RunFolder, name: str) -> list[Point]:
    return [(line["step"], line[name]) for line in run.metrics if _is_number(line.get(name)) and "step" in line]




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
AXES = {"step", "num_tokens", "seconds", "memory_bytes", "eval_perplexity", "eval_mean_token_accuracy", "eval_num_tokens"}
"""Other axes, and what says the same as a curve that is drawn."""
