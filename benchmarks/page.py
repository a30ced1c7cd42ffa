"""The figures of docs/performance.md, made from results.csv: `python -m benchmarks.page` writes them anew.

Tables stand between the lines `<!-- figures -->` and `<!-- end of figures -->`; the picture is docs/performance.svg.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.chart import NAMES, Dot, Limit, scatter
from benchmarks.compare import MARGIN, read_rows
from benchmarks.memory_rows import ROWS
from benchmarks.rows import RESULTS, measured

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
WORDS_OF_WORK = ("lengths", "sequences", "length", "pairs", "prompt", "answer")
"""The words of a row's settings that say what the work was; the others say how it was done."""
TITLES = {
    ("sft", "nf4", "fixed"): "QLoRA",
    ("sft", "bf16", "fixed"): "LoRA on bf16 weights",
    ("sft", "full16", "fixed"): "All weights trained",
    ("sft", "nf4", "alpaca"): "QLoRA on ragged rows",
    ("dpo", "nf4", ""): "DPO with QLoRA",
}
ATTENTION, BACKWARD = "attention ", "backward "
"""How the names of its rows begin, and go on."""
MISSING = "\N{EN DASH}"
COMPUTE_BF16, COMPUTE_FP8 = 790e12, 1400e12
TOKEN, BLOCKS = 28.55e9, 25.90e9
"""FLOP of a token with LoRA on the Llama-2-7B shape, rows of 2,048 tokens, nothing computed twice; those of the blocks'
matrices among them, which FP8 makes faster."""
LIMITS = (
    Limit("limit: bf16 at 790 TFLOP/s", COMPUTE_BF16 / TOKEN),
    Limit(
        "limit: matrices of the blocks in FP8 at 1,400 TFLOP/s",
        1 / (BLOCKS / COMPUTE_FP8 + (TOKEN - BLOCKS) / COMPUTE_BF16),
    ),
)
Row = Mapping[str, str]


class Work(NamedTuple):
    """What several systems did: a table."""

    benchmark: str
    shape: str
    storage: str
    words: str
    device: str


def main(words: Sequence[str]) -> None:
    """Writes the tables and the picture."""
    if words:
        raise ValueError(f"{words[0]} is not known: nothing can be asked for")
    rows = read_rows(RESULTS)
    page = DOCS / "performance.md"
    text, drawn = filled(page.read_text(encoding="utf-8"), rows), picture(rows)
    page.write_text(text, encoding="utf-8")
    (DOCS / "performance.svg").write_text(drawn, encoding="utf-8")


def filled(page: str, rows: Sequence[Row]) -> str:
    """The page with the tables of these rows."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = measured(rows)
    devices = dict.fromkeys(row["device"] for row in rows)
    of_each = [[row for row in rows if row["device"] == device] for device in devices]
    tables = [table(work, run) for work, run in runs(rows)]
    tables += [kind(own) for kind in (memory, attention, kernels) for own in of_each]
    text = "\n\n".join("\n".join(lines) for lines in tables if lines)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def runs(rows: Iterable[Row]) -> Iterator[tuple[Work, list[Row]]]:
    """Every work with its last run beside peers, else its last; a run is what was measured on a day at a commit.

    The run comes last; before it what other runs of that day measured with settings for which it had no time.
    """
    found: dict[Work, dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if row["benchmark"] in ("sft", "dpo"):
            words = words_of(row)
            told = " ".join(f"{key}={words[key]}" for key in WORDS_OF_WORK if key in words)
            if not told:
                continue  # rows of the first day do not say what the work was
            work = Work(row["benchmark"], row["shape"], row["storage"], told, row["device"])
            found.setdefault(work, {}).setdefault((row["date"], row["commit"]), []).append(row)
    for work, by_run in sorted(found.items(), key=lambda item: _place(item[0])):
        with_peers = [run for run in by_run.values() if {row["system"] for row in run} - {"burnish"}]
        chosen = _last_of_each([*by_run.values()][-1] if not with_peers else with_peers[-1])
        day, had = chosen[-1]["date"], {_how(row) for row in chosen}
        others = [row for (date, _), run in by_run.items() if date == day for row in run if _how(row) not in had]
        yield work, [*_last_of_each(others), *chosen]


def words_of(row: Row) -> dict[str, str]:
    """A row's settings by name."""
    return {key: value for key, _, value in (word.partition("=") for word in row["settings"].split())}


def _place(work: Work) -> tuple[object, ...]:
    order = [*TITLES]
    return (order.index(_kind(work)) if _kind(work) in order else len(order), work.shape != "llama-2-7b", work)


def _kind(work: Work) -> tuple[str, str, str]:
    lengths = "alpaca" if "alpaca" in work.words else "fixed"
    return (work.benchmark, work.storage, lengths if work.benchmark == "sft" else "")


def _last_of_each(run: Sequence[Row]) -> list[Row]:
    """A run's rows without those that were measured again in it."""
    return [*{_how(row): row for row in run}.values()]


def _how(row: Row) -> tuple[str, ...]:
    return row["system"], row["checkpointing"], row["settings"]


def table(work: Work, run: Sequence[Row]) -> list[str]:
    """A heading, what was done, and a line for each system and setting."""
    unit = "pairs/s" if work.benchmark == "dpo" else "tokens/s"
    last = run[-1]
    lines = [
        f"### {TITLES.get(_kind(work), f'{work.benchmark}, {work.storage}')}: {work.shape}",
        "",
        f"{work.device}, {last['date']}, commit {last['commit']}, PyTorch {last['torch']}"
        + (f"; `{work.words}`." if work.words else "."),
        "",
        f"| system | settings | {unit} | rounds | GiB allocated | reserved | first step, s | beside |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    order = [*NAMES]
    for row in sorted(run, key=lambda row: (side_of(row), order.index(row["system"]))):
        rate = row["samples_per_second"] if work.benchmark == "dpo" else f"{int(row['tokens_per_second']):,}"
        memory_of_row = [row["peak_allocated_gib"], row["peak_reserved_gib"]]
        system = NAMES[row["system"]] + ("" if row["commit"] == last["commit"] else f" ({row['commit']})")
        cells = [system, told_of(row), rate, rounds_of(row), *memory_of_row]
        lines.append(f"| {' | '.join([*cells, row['compile_seconds'], beside(row, run)])} |")
    return lines


def rounds_of(row: Row) -> str:
    """How often a row was measured; where that came to different speeds, from which to which."""
    speeds = sorted(re.findall(r"\d+(?:\.\d+)?", row["note"].partition(";")[0]), key=float)
    if not speeds or float(speeds[-1]) <= (1 + MARGIN) * float(speeds[0]):
        return str(len(speeds))
    least, most = (f"{int(speed):,}" if speed.isdecimal() else speed for speed in (speeds[0], speeds[-1]))
    return f"{len(speeds)} ({least} to {most})"


def memory(rows: Sequence[Row]) -> list[str]:
    """The last figures of each row of memory and cap; all rows are of one device."""
    latest = {(words_of(row)["row"], words_of(row)["cap"]): row for row in rows if row["benchmark"] == "memory"}
    if not latest:
        return []
    order = [*ROWS]
    lines = [
        f"### Memory: {rows[0]['device']}",
        "",
        "| what | promised elsewhere | target | GiB allocated | reserved | host | tokens/s | cap | how | commit |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | --- | --- | --- |",
    ]
    for (name, cap), row in sorted(latest.items(), key=lambda item: order.index(item[0][0])):
        rate = f"{int(row['tokens_per_second']):,}" if row["tokens_per_second"] else ""
        on_host = re.search(r"on the host: ([^;]*?)( GiB)?(;|$)", row["note"])
        figures = [row["peak_allocated_gib"], row["peak_reserved_gib"], on_host[1] if on_host else "", rate]
        cells = [ROWS[name].what, ROWS[name].promise, ROWS[name].target, *figures, cap, how_of(row), row["commit"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def how_of(row: Row) -> str:
    """How a row of memory came out, or that it did not fit, and with which settings."""
    words = {key: value for key, value in words_of(row).items() if key not in ("row", "cap", "most", *WORDS_OF_WORK)}
    told = " ".join(f"{key}={value}" for key, value in words.items())
    if not row["tokens_per_second"]:
        return f"{row['note'].partition(':')[0]}; {told}"
    if ROWS[words_of(row)["row"]].kind != "longest":
        return told
    return f"{int(row['tokens_per_step']):,} tokens, {float(row['step_seconds']):.1f} s a step; {told}"


def kernels(rows: Sequence[Row]) -> list[str]:
    """The last figures of each kernel and product; all rows are of one device. A copy alone says nothing."""
    latest = {name: row for row in rows if (name := name_of(row)) and not name.startswith(ATTENTION)}
    if not latest.keys() - {"copy"}:
        return []
    lines = [
        f"### Kernels and products: {rows[0]['device']}",
        "",
        "| name | ms | | commit |",
        "| --- | ---: | --- | --- |",
    ]
    for name, row in latest.items():
        lines.append(f"| {name} | {1000 * float(row['step_seconds']):.4f} | {row['note']} | {row['commit']} |")
    return lines


def attention(rows: Sequence[Row]) -> list[str]:
    """The last milliseconds of attention over packed sequences, a line for each batch and a column for each way.

    All rows are of one device. What is missing of a pair is a dash; a line not of the heading's commit names its own.
    """
    found: dict[str, dict[str, dict[bool, Row]]] = {}
    last: Row | None = None
    for row in rows:
        if name_of(row).startswith(ATTENTION):
            title, _, way = name_of(row).removeprefix(ATTENTION).rpartition(", ")
            pair = found.setdefault(title.removeprefix(BACKWARD), {}).setdefault(way, {})
            pair[title.startswith(BACKWARD)] = last = row
    if last is None:
        return []
    ways = list(dict.fromkeys(way for line in found.values() for way in line))
    lines = [f"### Attention over packed sequences, forward + backward, ms: {last['device']}", ""]
    lines += [f"{last['date']}, commit {last['commit']}, PyTorch {last['torch']}.", ""]
    lines += [f"| sequences | {' | '.join(ways)} |", f"| --- |{' ---: |' * len(ways)}"]
    for title, line in found.items():
        commits = dict.fromkeys(row["commit"] for pair in line.values() for row in pair.values())
        of = "" if [*commits] == [last["commit"]] else f" ({', '.join(commits)})"
        lines.append(f"| {title}{of} | {' | '.join(_pair(line.get(way, {})) for way in ways)} |")
    return lines


def _pair(pair: Mapping[bool, Row]) -> str:
    """Milliseconds forward and backward, of what was measured."""
    found = (pair.get(backward) for backward in (False, True))
    told = (MISSING if row is None else f"{1000 * float(row['step_seconds']):.3f}" for row in found)
    return " + ".join(told) if pair else ""


def name_of(row: Row) -> str:
    """The name of a kernel's row; empty: the row is another benchmark's."""
    return row["settings"].removeprefix("name=") if row["benchmark"] == "kernels" else ""


def side_of(row: Row) -> str:
    """Which systems a row is held against: those of its side; of DPO, where the reference is had the same way."""
    words = words_of(row)
    recomputed = row["checkpointing"] == "True" or words.get("memory") == "least"
    return words.get("side") or f"{words.get('reference', '')} {'lean' if recomputed else 'fast'}"


def told_of(row: Row) -> str:
    """How a row's work was done."""
    words = {key: value for key, value in words_of(row).items() if key not in WORDS_OF_WORK}
    if row["checkpointing"]:
        words["checkpointing"] = row["checkpointing"].lower()
    return " ".join(f"{key}={value}" for key, value in words.items())


def beside(row: Row, run: Sequence[Row]) -> str:
    """Burnish's speed over that of each peer's fastest setting of the same side, where that is of the same run."""
    if row["system"] != "burnish":
        return ""
    parts: list[str] = []
    for system, name in NAMES.items():
        others = [other for other in run if other["system"] == system != "burnish" and side_of(other) == side_of(row)]
        fastest = max(others, key=lambda other: float(other["tokens_per_second"]), default=None)
        if fastest is not None and fastest["commit"] == row["commit"]:
            parts.append(f"{float(row['tokens_per_second']) / float(fastest['tokens_per_second']):.2f}x {name}")
    return ", ".join(parts)


def picture(rows: Sequence[Row]) -> str:
    """Speed against memory on the Llama-2-7B shape, rows of 2,048 tokens, on the device of the last run."""
    chosen = [
        (work, run)
        for work, run in runs(measured(rows))
        if (work.benchmark, work.shape) == ("sft", "llama-2-7b")
        and work.storage in ("nf4", "bf16")
        and "alpaca" not in work.words
    ]
    if not chosen:
        raise ValueError(f"{RESULTS.name} has no row of LoRA on llama-2-7b to draw: measure with benchmarks.sft first")
    device = max(chosen, key=lambda item: (item[1][-1]["date"], "H100" in item[0].device))[0].device
    latest: dict[str, list[Row]] = {}
    for work, run in sorted(chosen, key=lambda item: item[1][-1]["date"]):
        if work.device == device:
            latest[work.storage] = run
    dots = [
        Dot(
            row["system"],
            label_of(row),
            float(row["peak_allocated_gib"]),
            float(row["tokens_per_second"]),
            storage == "bf16",
        )
        for storage, run in latest.items()
        for row in run
    ]
    title = f"Tokens per second against peak memory, LoRA on the Llama-2-7B shape, 4 x 2048 tokens a step, {device}"
    return scatter(dots, LIMITS, title)


def label_of(row: Row) -> str:
    """A setting in two or three words."""
    words = words_of(row)
    if row["system"] != "burnish" or "memory" not in words:
        return "recomputed" if row["checkpointing"] == "True" else "kept"
    return f"memory={words['memory']}" + (", FP8" if words["fp8"] == "true" else "")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"benchmarks/page.py: {error}")
