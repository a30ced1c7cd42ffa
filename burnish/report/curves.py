"""Which curves of metrics.jsonl the page draws, and the series that go into them. Titles say what is measured."""

import math
from collections.abc import Mapping, Sequence
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
    """Every curve that some run has points for; runs that measured the same thing are in one picture."""
    logged = {name for run in runs for line in run.metrics for name, value in line.items() if _is_number(value)}
    steps = STEPS | PAIR_STEPS | POLICY_STEPS
    known = TRAINED.keys() | HELD_OUT.keys() | PAIRS.keys() | POLICY.keys() | steps.keys() | AXES
    kinds = [_kind(run) for run in runs]
    longest = max((_span(_logged(run, "loss")) for run in runs), default=1)
    main: list[Figure] = []
    for kind, words in LOSSES.items():
        own = [i for i, found in enumerate(kinds) if found == kind]
        main += _figures({"loss": words, **MORE_OF[kind]}, runs, names, only=own)
        main += _figures({"eval_loss": HELD_OUT_LOSSES[kind]}, runs, names, only=own)
    return Curves(
        main=main + _figures(HELD_OUT, runs, names) + _over_optimisation(runs, names),
        steps=_figures(steps, runs, names, small=True),
        more=_figures({name: name for name in sorted(logged - known)}, runs, names, small=True),
        smoothed=longest if longest > 1 else 0,
    )


def _kind(run: RunFolder) -> str:
    """What the loss of a run is: losses of different kinds do not belong into one picture."""
    logged = {name for line in run.metrics for name in line}
    return "policy" if "reward" in logged else "pairs" if "margin" in logged else "tokens"


def _figures(
    titles: Mapping[str, str],
    runs: Sequence[RunFolder],
    names: Sequence[str],
    small: bool = False,
    only: Sequence[int] | None = None,
) -> list[Figure]:
    """A figure for each metric that some run (of `only` these) has a finite value of."""
    width, height = (280, 170) if small else (400, 230)
    found: list[Figure] = []
    for key, title in titles.items():
        members = [(i, run) for i, run in enumerate(runs) if only is None or i in only]
        series = [line for i, run in members for line in _series(run, key, names[i], i)]
        if any(math.isfinite(y) for line in series for _, y in line.points):
            found.append(Figure(title, line_chart(series, title, width=width, height=height)))
    return found


def _over_optimisation(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Figure]:
    """The reward that is trained on beside one that is not: where they part, the policy games the first (Gao 2022).

    They have scales of their own, so each is drawn as its change since the start, over the largest.
    """
    series: list[Series] = []
    for i, run in enumerate(runs):
        other = [] if str(run.row.get("scorer", "reward.")).startswith("reward.") else _held_out(run, "eval_reward")
        points, gold = _logged(run, "reward"), _logged(run, "gold") or other
        if points and len(gold) > 2:
            smoothed = smooth(points, _span(points)) if _span(points) > 1 else points
            series.append(Series(f"{names[i]}, trained on", tuple(thin(_gains(smoothed), MOST_POINTS)), i))
            series.append(Series(f"{names[i]}, not trained on", tuple(thin(_gains(gold), MOST_POINTS)), i, dots=True))
    if not series:
        return []
    title = "Gain in the reward trained on, and (dots) in one that is not; 1 is the largest"
    return [Figure(title, line_chart(series, title))]


def _gains(points: Sequence[Point]) -> list[Point]:
    largest = max((abs(y - points[0][1]) for _, y in points if math.isfinite(y)), default=0.0) or 1.0
    return [(x, (y - points[0][1]) / largest) for x, y in points]


def _series(run: RunFolder, key: str, name: str, style: int) -> list[Series]:
    """The lines of one run: smoothed, as logged, or with dots where it was measured now and then."""
    if key in HELD_OUT or key == "eval_loss":
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
    if not points and not name.endswith("loss"):
        return []  # two points are in the table already
    start, end = run.row.get("before", {}).get(name), run.row.get("metrics", {}).get(name)
    last = max((line["step"] for line in run.metrics if "step" in line), default=None)
    if _is_number(start):
        points.insert(0, (0, start))
    if _is_number(end) and last is not None and (not points or points[-1][0] < last):
        points.append((last, end))
    return points


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


LOSSES = {"tokens": "Training loss", "pairs": "Training loss, of pairs", "policy": "Loss of the policy"}
"""By what a run's loss is a mean over."""
HELD_OUT_LOSSES = {"tokens": "Held-out loss", "pairs": "Held-out loss, of pairs", "policy": "Held-out loss"}
TRAINED = {"loss": "", "mean_token_accuracy": "Token accuracy in training"}
PAIRS = {"accuracy": "Pairs ranked right in training", "margin": "By how much the better answer is ahead"}
PAIR_STEPS = {
    "chosen_reward": "Implicit reward of chosen answers",
    "rejected_reward": "Implicit reward of rejected answers",
    "chosen_score": "Score of chosen answers",
    "rejected_score": "Score of rejected answers",
}
POLICY = {"reward": "Reward of the answers", "kl": "KL from the reference, in nats an answer"}
MORE_OF = {"tokens": {"mean_token_accuracy": TRAINED["mean_token_accuracy"]}, "pairs": PAIRS, "policy": POLICY}
HELD_OUT = {
    "eval_reward": "Held-out reward",
    "eval_kl": "Held-out KL from the reference",
    "eval_win_rate": "Win rate against where it started",
    "eval_accuracy": "Held-out pairs ranked right",
    "eval_exact_match": "Held-out accuracy",
    "eval_general_loss": "Loss on general text",
}
STEPS = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_second": "Tokens per second"}
POLICY_STEPS = {
    "clip_fraction": "Share of ratios that were clipped",
    "explained_variance": "Variance that values explain",
    "entropy": "Entropy of a token, in nats",
    "eos_rate": "Share of answers that end by themselves",
    "answer_tokens": "Tokens of an answer",
    "reward_length_correlation": "Correlation of reward and length",
    "reward_std": "Deviation of rewards in a step",
    "beta": "β, what a nat costs",
    "value_loss": "Loss of the value model",
}
SMOOTHED = (
    {"loss", "mean_token_accuracy", "grad_norm", "tokens_per_second"} | PAIRS.keys() | PAIR_STEPS.keys() | POLICY.keys()
)
AXES = {
    "tokens",
    "step",
    "num_tokens",
    "seconds",
    "memory_bytes",
    "eval_loss",
    "eval_perplexity",
    "eval_mean_token_accuracy",
    "eval_num_tokens",
}
"""Other axes, and what says the same as a curve that is drawn."""
