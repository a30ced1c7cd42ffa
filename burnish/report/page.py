"""The report: one HTML page that needs nothing but itself, about one run or several side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

import burnish
from burnish.data.audit import Audit
from burnish.report.charts import NUM_STYLES, bar_chart
from burnish.report.curves import draw_curves
from burnish.report.folders import Row, RunFolder, labels, read_run
from burnish.report.settings import flat, side_by_side
from burnish.report.table import TABLED, bases, columns, start
from burnish.report.units import ABSENT, MINUS, compact, count, decimal, duration, listing, percent, size
from burnish.report.verdicts import Model, pair_samples, task_groups

OPEN_SAMPLES = 6
"""Samples in view; the others unfold."""

HEADLINES = {
    "eval_exact_match_seen": "Accuracy on held-out prompts of seen families",
    "eval_exact_match": "Accuracy on held-out prompts",
    "eval_reward": "Reward on held-out prompts",
    "eval_accuracy": "Held-out pairs ranked right",
    "eval_loss": "Held-out loss",
}
"""What the summary reports, the first of these that was measured."""
SHARES = {"eval_exact_match_seen", "eval_exact_match", "eval_accuracy"}


def write_page(folders: Sequence[Path], out: Path, title: str) -> Path:
    """The path of the page, after writing it. Raises ValueError when one of the folders holds no finished run."""
    runs = [read_run(folder) for folder in folders]
    rows = [run.row for run in runs]
    names = labels(rows)
    trained = [
        Model(name, f"s{i % NUM_STYLES}", run.after) for i, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    models = [Model(base.label, "base", runs[base.run].before) for base in bases(rows)] + trained
    row_names, found = columns(rows)
    html = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=title,
            summary=summary(runs, names),
            trained=trained,
            models=models,
            row_names=row_names,
            columns=found,
            more=_more([run.row for run in runs]),
            memory=_memory([run.row for run in runs]),
            curves=draw_curves(runs, names),
            tasks=task_groups(models),
            samples=pair_samples(models),
            open_samples=OPEN_SAMPLES,
            audits=_distinct_audits(runs, names),
            settings=side_by_side([run.config for run in runs]),
            environment=side_by_side([run.environment for run in runs]),
            folders=folders,
            absent=ABSENT,
            version=burnish.__version__,
        )
    )
    out.write_text(html, encoding="utf-8")
    return out


def summary(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    """What was done and what came of it: a few sentences made of what the files say, where they say it."""
    return [sentence for sentence in (_task(runs), _outcome(runs, names), *_wins(runs, names)) if sentence]


def _task(runs: Sequence[RunFolder]) -> str:
    """From which base, on which data, how long, where: as far as it is the same for all runs."""
    model, data, device = (_shared(runs, name) for name in ("model.path", "data.path", "device"))
    if not model:
        return ""
    sizes = [number for run in runs if (number := _base_parameters(run.row))]
    tokens = {count(run.metrics[-1].get("num_tokens", 0)) for run in runs if run.metrics}
    parts = [f"{len(runs)} runs from " if len(runs) > 1 else "From "]
    parts.append("the embedded base" if model == "embedded" else model)
    parts.append(f" ({count(min(sizes))} parameters)" if sizes else "")
    parts.append(f" on {'the embedded data' if data == 'embedded' else data}" if data else "")
    parts.append(f", {tokens.pop()} tokens{' each' if len(runs) > 1 else ''}" if len(tokens) == 1 else "")
    parts.append(f" in {duration(runs[0].row.get('seconds', 0))}" if len(runs) == 1 else "")
    parts.append(f", on {device}" if device else "")
    return "".join(parts) + "."


def _outcome(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """What changed from before to after, by the first headline number that there is a before of, and a run has."""
    rows = [run.row for run in runs]
    starts = bases(rows)
    for key, words in HEADLINES.items():
        after = [(row["metrics"][key], name) for row, name in zip(rows, names, strict=True) if key in row["metrics"]]
        before = rows[starts[0].run]["before"].get(key) if len(starts) == 1 else None
        if before is None or not after:
            continue
        told = percent if key in SHARES else "{:.3f}".format
        if len(after) == 1:
            return f"{words}: {told(before)} before, {told(after[0][0])} after."
        ends = [f"{told(value)} with {name.replace('Full', 'full', 1)}" for value, name in after]
        return f"{words}: {told(before)} before; {listing(ends)}."
    return ""


def _wins(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    """What learning from preferences brought: how often runs win against the one that they started from."""
    rows = [run.row for run in runs]
    found: dict[str, list[str]] = {}
    for row, name in zip(rows, names, strict=True):
        if (rate := row.get("metrics", {}).get("eval_win_rate")) is None:
            continue
        index, kl = start(rows, row), row["metrics"].get("eval_kl")
        rival = names[index] if index is not None else row.get("from", "the base")
        far = "" if kl is None else f" ({decimal(kl, 2)} nats away)"
        found.setdefault(rival, []).append(f"{name} wins {percent(rate)}{far}")
    return [f"Against {rival}, on held-out prompts, ties half: {listing(wins)}." for rival, wins in found.items()]


def _more(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """What was measured at the end of the runs and is in no column: name, and a value for each run."""
    measured = [dict(row.get("metrics", {})) for row in rows]
    for metrics in measured:
        if "eval_accuracy" in metrics and "eval_loss" in metrics:
            metrics["pair_loss"] = metrics["eval_loss"]  # the column of losses is for losses per token
    names = dict.fromkeys(name for metrics in measured for name in metrics if name not in TABLED)
    return [(name.removeprefix("eval_"), [_told(metrics.get(name)) for metrics in measured]) for name in names]


def _memory(rows: Sequence[Row]) -> dict[str, Any]:
    """What held the memory at the peak of a step of each run, class by class; nothing where no run knows."""
    peaks: list[dict[str, Any]] = [row.get("peak") or {} for row in rows]
    if not any(peaks):
        return {}
    classes: list[dict[str, int]] = [peak.get("classes", {}) for peak in peaks]
    names = dict.fromkeys(name for own in classes for name in own)
    lines = {name: [_bytes(own.get(name)) for own in classes] for name in names}
    lines["together"] = [_bytes(peak.get("bytes")) for peak in peaks]
    lines["in the"] = [peak.get("phase", ABSENT) for peak in peaks]
    lines["of step"] = [str(peak.get("step", ABSENT)) for peak in peaks]
    return {"lines": list(lines.items()), "graphs": any(peak.get("graphs") for peak in peaks)}


def _bytes(value: int | None) -> str:
    return ABSENT if value is None else size(value) if value else "0"


def _told(value: float | None) -> str:
    return ABSENT if value is None else f"{MINUS if value < 0 else ''}{compact(abs(value))}"


def _base_parameters(row: Row) -> int:
    """The weights of the model without its adapter; 0 when the row does not say."""
    total, trainable = row.get("total_parameters") or 0, row.get("trainable_parameters") or 0
    return total - trainable if trainable < total else total


def _shared(runs: Sequence[RunFolder], name: str) -> str | None:
    """A setting, or a fact of the environment, that all runs have in common."""
    values = {str(flat({**run.environment, **run.config}).get(name, "")) for run in runs}
    return values.pop() or None if len(values) == 1 else None


def _distinct_audits(runs: Sequence[RunFolder], names: Sequence[str]) -> list[tuple[str, Audit]]:
    """Each account of the data once, under the names of the runs that it is about (none when about all)."""
    found: list[tuple[list[str], Audit]] = []
    for name, run in zip(names, runs, strict=True):
        same = [members for members, audit in found if audit == run.audit]
        if same:
            same[0].append(name)
        elif run.audit:
            found.append(([name], run.audit))
    return [("" if len(members) == len(runs) else listing(members), audit) for members, audit in found]


def _histogram(audit: Audit) -> Markup:
    bars = [(f"{bound:,}", float(number)) for bound, number in audit.lengths.histogram]
    return Markup(bar_chart(bars, "Sequences by length", "tokens in the sequence, at most"))


def _breakable(name: str) -> Markup:
    """A name that may break after an underscore, for narrow screens."""
    return Markup(escape(name).replace("_", Markup("_<wbr>")))


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("burnish", "report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(percent=percent, number="{:,}".format, svg=Markup, breakable=_breakable)
    environment.filters.update(histogram=_histogram)
    return environment
