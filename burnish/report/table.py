"""The table that compares runs: its columns, and the table as Markdown."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.report.folders import Row, labels
from burnish.report.units import ABSENT, TIMES, count, decimal, duration, percent, signed, size

FULL = "Full fine-tuning"
BASE = "Base model"
TABLED = {
    *("eval_loss", "eval_general_loss", "eval_exact_match", "eval_exact_match_seen", "eval_exact_match_unseen"),
    *("eval_reward", "eval_kl", "eval_win_rate", "eval_accuracy"),
}
"""The measurements that columns are made of."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: a cell for each base, then for each run."""

    title: str
    short: str
    """The title in Markdown, where width counts."""
    note: str
    """What the number is and which way is better, in one sentence."""
    cells: tuple[str, ...]
    best: tuple[bool, ...]
    """Which cells hold the best number among the runs; none where all are the same, or none is better."""


@dataclass(frozen=True, slots=True)
class Base:
    """What runs started from, as one of them measured it before training."""

    label: str
    run: int
    """The run that measured it."""


@dataclass(frozen=True, slots=True)
class _Kind:
    title: str
    short: str
    note: str
    value: Callable[[Row], float | None]
    text: Callable[[float, Row], str]
    better: Callable[[Sequence[float]], float] | None = None
    """`min` or `max`; None where neither is better."""


def forgetting(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """How much the loss on general text rose in training, in nats a token; None when it was not measured."""
    old, new = before.get("eval_general_loss"), after.get("eval_general_loss")
    return None if old is None or new is None else new - old


def bases(rows: Sequence[Row]) -> list[Base]:
    """The distinct starting points of the runs.

    Runs share one when they started from the same run, or when their measurements before training agree but for what
    storing the weights in 4 bits changes: 5 % of a loss, 5 points of an accuracy. A run that started from another one
    in the table has none: that one's line says where it started.
    """
    found: list[Base] = []
    for index, row in enumerate(rows):
        if not row.get("before") or start(rows, row) is not None:
            continue
        if not any(_same_start(row, rows[base.run]) for base in found):
            found.append(Base(f"Start ({row['from']})" if "from" in row else BASE, index))
    if len({base.label for base in found}) < len(found):
        names = labels(rows)
        found = [Base(f"{base.label} of {names[base.run]}", base.run) for base in found]
    return found


def start(rows: Sequence[Row], row: Row) -> int | None:
    """Which of the rows is the run that this one started from; None where it is not among them."""
    if "from" not in row:
        return None
    return next((i for i, other in enumerate(rows) if other is not row and other.get("run") == row["from"]), None)


def columns(rows: Sequence[Row]) -> tuple[list[str], list[Column]]:
    """The names of the lines (bases first, then runs) and the columns that at least one line has something for."""
    starts = bases(rows)
    lines = [_before(rows, base) for base in starts] + list(rows)
    found: list[Column] = []
    for kind in _kinds(rows):
        values = [kind.value(line) for line in lines]
        if any(value is not None for value in values):
            cells = tuple(ABSENT if v is None else kind.text(v, line) for v, line in zip(values, lines, strict=True))
            found.append(Column(kind.title, kind.short, kind.note, cells, _best(cells, values, len(starts), kind)))
    return [base.label for base in starts] + labels(rows), found


def _before(rows: Sequence[Row], base: Base) -> Row:
    """What is known of a starting point: what its run measured, and how others that started there were scored."""
    own = rows[base.run]
    same = [row for row in rows if row.get("before") and start(rows, row) is None and _same_start(row, own)]
    against_itself = ("eval_kl", "eval_win_rate")
    metrics = {name: value for name, value in own["before"].items() if name not in against_itself}
    scored = next((row for row in (own, *same) if "eval_reward" in row["before"]), own)
    rewards = {name: value for name, value in scored["before"].items() if name == "eval_reward"}
    return {"metrics": metrics | rewards, "scorer": scored.get("scorer", "")}


def table(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table whose columns line up in a terminal as well."""
    names, found = columns(rows)
    grid = [["method", *(column.short for column in found)]]
    grid += [[name, *(column.cells[i] for column in found)] for i, name in enumerate(names)]
    grid = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in grid]
    widths = [max(3, *(len(line[i]) for line in grid)) for i in range(len(grid[0]))]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in grid]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _kinds(rows: Sequence[Row]) -> list[_Kind]:
    """Every column that there can be, in order."""
    full = next((row["seconds"] for row in rows if row["method"] == FULL and row.get("seconds")), None)
    relative = full is not None and len(rows) > 1
    when = f"time ({TIMES} full)" if relative else "time"

    def time(seconds: float, _: Row) -> str:
        return duration(seconds) + (f" ({seconds / full:.2f}{TIMES})" if relative and full else "")

    def trainable(number: float, row: Row) -> str:
        total = row.get("total_parameters")
        return count(number) + (f" ({percent(number / total)})" if total else "")

    return [
        _Kind(
            "trainable parameters",
            "trainable",
            "Weights that training changed, and their share of all weights.",
            _top("trainable_parameters"),
            trainable,
        ),
        _Kind(
            "peak memory",
            "memory",
            "The most memory that tensors held at once in a training step.",
            _top("peak_memory_bytes"),
            lambda v, _: size(v),
            min,
        ),
        _Kind(when, when, "Time spent in the training loop, with the evaluations in it.", _top("seconds"), time, min),
        _Kind(
            "held-out loss",
            "loss",
            "Mean loss per token on rows kept out of training, in nats; lower is better.",
            _likelihood,
            _loss,
            min,
        ),
        *_accuracies(rows),
        *_preferences(rows),
        _Kind(
            "forgetting",
            "forgetting",
            "Rise of the loss on general text since the base, in nats a token; 0 is nothing forgotten.",
            _forgetting(rows),
            lambda v, _: signed(v),
            min,
        ),
    ]


def _accuracies(rows: Sequence[Row]) -> list[_Kind]:
    """Accuracy on seen and unseen families where the two were told apart, else over all, else of single tokens."""
    measured = {name for row in rows for source in ("metrics", "before") for name in row.get(source) or {}}
    kinds = [
        _Kind(
            "accuracy, seen families",
            "seen acc.",
            "Share of held-out prompts answered right, from families of tasks that were trained on.",
            _metric("eval_exact_match_seen"),
            _share,
            max,
        ),
        _Kind(
            "accuracy, unseen families",
            "unseen acc.",
            "Share of prompts answered right, from families of tasks that were never trained on.",
            _metric("eval_exact_match_unseen"),
            _share,
            max,
        ),
    ]
    if measured & {"eval_exact_match_seen", "eval_exact_match_unseen"}:
        return kinds
    if "eval_exact_match" in measured:
        return [
            _Kind(
                "held-out accuracy",
                "accuracy",
                "Share of held-out prompts answered right.",
                _metric("eval_exact_match"),
                _share,
                max,
            )
        ]
    return [
        _Kind(
            "token accuracy",
            "token acc.",
            "Share of held-out tokens that the model would have picked.",
            _metric("eval_mean_token_accuracy"),
            _share,
            max,
        )
    ]


def _preferences(rows: Sequence[Row]) -> list[_Kind]:
    """What learning from preferences is about: reward, distance from the reference, wins against it, pairs."""
    scorers = list(dict.fromkeys(row.get("scorer", "") for row in rows if _metric("eval_reward")(row) is not None))
    rival = _rival(rows)
    return [
        *(_reward(rows, scorer, f" ({scorer})" if len(scorers) > 1 else "") for scorer in scorers),
        _Kind(
            "KL from the reference",
            "KL",
            "How far the answers moved: their log-probability minus that under the reference, in nats an answer.",
            _metric("eval_kl"),
            lambda v, _: decimal(v, 2 if abs(v) >= 0.1 else 3),
        ),
        _Kind(
            f"win rate against {rival}",
            f"wins vs {rival}",
            "Share of held-out prompts where the answer earns a higher reward than that of the model which the run "
            "started from; ties count half.",
            _metric("eval_win_rate"),
            _share,
            max,
        ),
        _Kind(
            "pairs ranked right",
            "pairs",
            "Share of held-out pairs whose better answer scores higher: by a reward model's score, or by how much "
            "likelier than the reference a policy finds it.",
            _metric("eval_accuracy"),
            _share,
            max,
        ),
    ]


def _rival(rows: Sequence[Row]) -> str:
    """Against whom the win rates are: the one run that all of them started from, by its method, else `start`."""
    measured = [row for row in rows if _metric("eval_win_rate")(row) is not None]
    names = {rows[i]["method"] if (i := start(rows, row)) is not None else row.get("from", "base") for row in measured}
    return str(names.pop()).replace(FULL, "full") if len(names) == 1 else "start"


def _reward(rows: Sequence[Row], scorer: str, suffix: str) -> _Kind:
    """The mean score of held-out answers; where a run was not scored, what one that started from it measured first."""

    def value(row: Row) -> float | None:
        own = _metric("eval_reward")(row) if row.get("scorer", "") == scorer else None
        if own is not None:
            return own
        heirs = [
            r for r in rows if r.get("scorer", "") == scorer and (i := start(rows, r)) is not None and rows[i] is row
        ]
        return next((found for r in heirs if (found := (r.get("before") or {}).get("eval_reward")) is not None), None)

    note = "Mean score of greedy answers to held-out prompts" + (f", given by {scorer}." if scorer else ".")
    return _Kind(f"held-out reward{suffix}", f"reward{suffix}", note, value, lambda v, _: decimal(v, 3), max)


def _best(cells: Sequence[str], values: Sequence[float | None], num_bases: int, kind: _Kind) -> tuple[bool, ...]:
    """Which runs have the best value, or one that reads the same; none when all read the same."""
    read = {v: cell for v, cell in zip(values[num_bases:], cells[num_bases:], strict=True) if v is not None}
    finite = [v for v in read if math.isfinite(v)]
    if kind.better is None or len(set(read.values())) < 2 or not finite:
        return (False,) * len(cells)
    best = read[kind.better(finite)]
    return tuple(i >= num_bases and cell == best for i, cell in enumerate(cells))


def _same_start(one: Row, other: Row) -> bool:
    if "from" in one or "from" in other:
        return one.get("from") == other.get("from")
    return _agree(one["before"], other["before"])


def _agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if name.endswith("loss") and abs(a - b) > 0.05 * max(abs(a), abs(b)):
            return False
        if "exact_match" in name and abs(a - b) > 0.05:
            return False
    return True


def _top(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


def _metric(name: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        return (row.get("metrics") or {}).get(name)

    return value


def _likelihood(row: Row) -> float | None:
    """The held-out loss per token; None where the loss is one of pairs, which is another quantity."""
    return None if _metric("eval_accuracy")(row) is not None else _metric("eval_loss")(row)


def _forgetting(rows: Sequence[Row]) -> Callable[[Row], float | None]:
    """Since the start of the first of the runs that led to a row."""

    def value(row: Row) -> float | None:
        first, seen = row, 0
        while (index := start(rows, first)) is not None and seen < len(rows):
            first, seen = rows[index], seen + 1
        return forgetting(first.get("before") or {}, row.get("metrics") or {})

    return value


def _loss(value: float, _: Any) -> str:
    return f"{value:.3f}"


def _share(value: float, _: Any) -> str:
    return f"{100 * value:.1f}%"
