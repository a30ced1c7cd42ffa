"""What methods cost on one model, as a table for the terminal: a column for each."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from burnish.report.units import ABSENT, count, duration, size
from burnish.settings import TrainingSettings

if TYPE_CHECKING:
    from burnish.engine.trial import Cost
    from burnish.model.shelf import Plan

WIDTH = 100
WORDS = {"x": "inputs", "qkv": "q/k/v", "attention": "attention", "x_mid": "MLP inputs", "gate_up": "gate/up"}
"""What people call the tensors of a block."""


class Row(NamedTuple):
    """One thing that was measured, or why it could not be."""

    name: str
    method: Literal["sft", "dpo"]
    settings: TrainingSettings | None
    problem: str = ""
    cost: "Cost | None" = None


def cost_lines(about: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """What was measured, the table, and what each row ran with."""
    found = [*_title(about, rows), "", *_table(rows), ""]
    for row in rows:
        found += _wrapped(f"{row.name}: ", row.problem or _conditions(row))
    if any(row.cost and row.cost.reserved is None for row in rows):
        found += [
            "",
            *_wrapped("", "On a CPU the bytes of live tensors are counted, in one step; nothing is reserved."),
        ]
    return found


def values(row: Row) -> dict[str, Any]:
    """The row as a JSON object."""
    found: dict[str, Any] = {"name": row.name, "method": row.method, "settings": _settings(row)}
    if row.cost is None:
        return found | {"problem": row.problem}
    cost, plan = row.cost, row.cost.plan
    names = {name: _blocks(plan, name) for name in WORDS} if plan else {}
    return found | {
        "tokens_per_second": cost.tokens / cost.step,
        "tokens": cost.tokens,
        "step_seconds": cost.step,
        "first_step_seconds": cost.first,
        "open_seconds": cost.opened,
        "trained_parameters": cost.trained,
        "peak_bytes": cost.peak.bytes,
        "peak_phase": cost.peak.phase,
        "classes": cost.peak.classes,
        "reserved_bytes": cost.reserved,
        "host_bytes": cost.host,
        "states_on_host_bytes": cost.states_away,
        "embedding_on_host": cost.embedding_away,
        "plan": names | {"decoded": plan.dense_blocks, "tile": plan.tile} if plan else {"again": cost.again},
        "gradients_taken": cost.taken,
        "computed_twice": cost.twice,
        "microbatch_limit": cost.limit,
    }


def _title(about: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    weights = ", random weights" if about["random"] else ""
    model = (
        f"{about['model']}{weights}: {about['layers']} layers, {about['width']:,} wide, {count(about['parameters'])}"
    )
    device = about["device"] + (f", capped at {about['cap']}" if about["cap"] else "")
    methods = {row.method for row in rows}
    works = [f"{about['sequences']} x {about['length']:,} tokens"] if "sft" in methods else []
    if "dpo" in methods:
        pairs = f"{about['sequences']} pair{'s' if about['sequences'] > 1 else ''}"
        works.append(f"{'with dpo ' if works else ''}{pairs} of {about['length']:,} tokens, half of them shared")
    return [f"{model} parameters", f"{device}; a step: {', '.join(works)}"]


def _table(rows: Sequence[Row]) -> list[str]:
    """The measured rows side by side; what could not be measured has a dash."""
    costs = [row.cost for row in rows]
    classes = next(cost.peak.classes for cost in costs if cost is not None)
    grid = [["", *(row.name for row in rows)]]
    for label, text in _LINES.items():
        grid.append([label, *(ABSENT if cost is None else text(cost) for cost in costs)])
        if label == "peak allocated":
            for name in classes:
                grid.append([f"  {name}", *(ABSENT if c is None else _bytes(c.peak.classes[name]) for c in costs)])
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in grid]


def _conditions(row: Row) -> str:
    """What the plan kept, and the settings, in words."""
    assert row.cost is not None
    cost = row.cost
    parts = [_planned(cost.plan, cost.host) if cost.plan else _unplanned(cost.again)]
    if cost.states_away:
        parts.append(f"states on the host ({size(cost.states_away)})")
    if cost.embedding_away:
        parts.append("the embedding on the host")
    if cost.taken:
        twice = ", each step computed twice for their norm (optim.clip=0 needs none)" if cost.twice else ""
        parts.append(f"gradients of one layer at a time{twice}")
    if cost.graphs:
        parts.append("CUDA graphs, whose memory is in what is reserved alone")
    if cost.limit is not None:
        parts.append(f"micro-batches divided to {cost.limit:,} tokens, since memory did not suffice")
    return "; ".join([*parts, " ".join(f"{key}={value}" for key, value in _settings(row).items())])


def _unplanned(again: bool) -> str:
    return "computes every block again" if again else "keeps everything"


def _planned(plan: "Plan", host: int) -> str:
    """What of how many blocks is kept, sent to the host and computed again."""
    blocks = {name: _blocks(plan, name) for name in WORDS}
    parts: list[str] = []
    for place, words in (("kept", "keeps"), ("host", f"on the host ({size(host)})"), ("again", "computes again")):
        found = {name: count[place] for name, count in blocks.items() if count[place]}
        if len(found) == len(WORDS) and set(found.values()) == {len(plan.kept)}:
            parts.append(f"{words} everything")
        elif found:
            total = len(plan.kept)
            listed = (WORDS[name] + (f" of {n} blocks" if n < total else "") for name, n in found.items())
            parts.append(f"{words} {', '.join(listed)}")
    if plan.dense_blocks:
        parts.append(f"weights of {plan.dense_blocks} blocks decoded")
    if plan.tile is not None:
        parts.append(f"MLPs on {plan.tile:,} tokens at a time")
    return "; ".join(parts)


def _blocks(plan: "Plan", name: str) -> dict[str, int]:
    """Of how many blocks a tensor is kept, on the host, or computed again."""
    kept, host = (sum(name in names for names in places) for places in (plan.kept, plan.host))
    return {"kept": kept, "host": host, "again": len(plan.kept) - kept - host}


def _settings(row: Row) -> dict[str, Any]:
    """The settings that the figures depend on the most."""
    if row.settings is None:
        return {}
    model, adapter, run = row.settings.model, row.settings.adapter, row.settings.run
    shape = {"adapter.rank": adapter.rank} if adapter.kind in ("lora", "dora") else {}
    return {
        "model.storage": model.storage,
        "adapter.kind": adapter.kind,
        **shape,
        "optim.kind": row.settings.optim.kind,
        "run.dtype": row.cost.dtype if row.cost else run.dtype,
        "run.memory": run.memory,
        "run.microbatch_tokens": run.microbatch_tokens,
    }


def _wrapped(begin: str, text: str) -> list[str]:
    return textwrap.wrap(begin + text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _bytes(number: int) -> str:
    return size(number) if number else "0"


_LINES: dict[str, Callable[["Cost"], str]] = {
    "tokens a second": lambda cost: f"{cost.tokens / cost.step:,.0f}",
    "ms a step": lambda cost: f"{1000 * cost.step:,.0f}" if cost.step >= 0.1 else f"{1000 * cost.step:.1f}",
    "first step": lambda cost: duration(cost.first),
    "model ready in": lambda cost: duration(cost.opened),
    "trained": lambda cost: count(cost.trained),
    "peak allocated": lambda cost: size(cost.peak.bytes),
    "peak is in": lambda cost: cost.peak.phase.removesuffix(" pass"),
    "peak reserved": lambda cost: ABSENT if cost.reserved is None else size(cost.reserved),
}
