"""The figures of docs/performance.md, made from results.csv: `python -m benchmarks.page` writes them anew.

Tables stand between the lines `<!-- figures -->` and `<!-- end of figures -->`; the picture is docs/performance.svg.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.chart import NAMES, Dot, Limit, scatter
from benchmarks.compare import read_rows
from benchmarks.memory_rows import ROWS
from benchmarks.rows import RESULTS

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
ATTENTION = "attention "
"""How the names of its rows begin."""
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


def main() -> None:
    """Writes the tables and the picture."""
    rows = read_rows(RESULTS)
    page = DOCS / "performance.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    (DOCS / "performance.svg").write_text(picture(rows), encoding="utf-8")


def filled(page: str, rows: Sequence[Row]) -> str:
    """The page with the tables of these rows."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = [*(table(work, run) for work, run in runs(rows)), memory(rows), attention(rows), kernels(rows)]
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
        rounds = str(len(re.findall(r"[\d.]+", row["note"].partition(";")[0])))
        memory_of_row = [row["peak_allocated_gib"], row["peak_reserved_gib"]]
        system = NAMES[row["system"]] + ("" if row["commit"] == last["commit"] else f" ({row['commit']})")
        cells = [system, told_of(row), rate, rounds, *memory_of_row]
        lines.append(f"| {' | '.join([*cells, row['compile_seconds'], beside(row, run)])} |")
    return lines


def memory(rows: Sequence[Row]) -> list[str]:
    """The last figures of each row of memory and cap, on the device of the last of them."""
    measured = [row for row in rows if row["benchmark"] == "memory"]
    if not measured:
        return []
    device, order = measured[-1]["device"], [*ROWS]
    latest: dict[tuple[str, str], Row] = {}
    for row in measured:
        if row["device"] == device:
            latest[words_of(row)["row"], words_of(row)["cap"]] = row
    lines = [
        f"### Memory: {device}",
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
    """The last figures of each kernel and product, on the device of the last of them."""
    latest = {name: row for name, row in _named(rows).items() if not name.startswith(ATTENTION)}
    if not latest:
        return []
    lines = [
        f"### Kernels and products: {_device(latest)}",
        "",
        "| name | ms | | commit |",
        "| --- | ---: | --- | --- |",
    ]
    for name, row in latest.items():
        lines.append(f"| {name} | {1000 * float(row['step_seconds']):.4f} | {row['note']} | {row['commit']} |")
    return lines


def attention(rows: Sequence[Row]) -> list[str]:
    """The last milliseconds of attention over packed sequences, a line for each batch and a column for each way."""
    latest = {name: row for name, row in _named(rows).items() if name.startswith(ATTENTION)}
    if not latest:
        return []
    found: dict[str, dict[str, str]] = {}
    for name, row in latest.items():
        title, _, way = name.removeprefix(ATTENTION).rpartition(", ")
        milliseconds = f"{1000 * float(row['step_seconds']):.3f}"
        line = found.setdefault(title.removeprefix("backward "), {})
        line[way] = f"{line[way]} + {milliseconds}" if way in line else milliseconds
    ways = list(dict.fromkeys(way for line in found.values() for way in line))
    last = [*latest.values()][-1]
    lines = [f"### Attention over packed sequences, forward + backward, ms: {_device(latest)}", ""]
    lines += [f"{last['date']}, commit {last['commit']}, PyTorch {last['torch']}.", ""]
    lines += [f"| sequences | {' | '.join(ways)} |", f"| --- |{' ---: |' * len(ways)}"]
    return lines + [f"| {title} | {' | '.join(line.get(way, '') for way in ways)} |" for title, line in found.items()]


def _named(rows: Sequence[Row]) -> dict[str, Row]:
    measured = [row for row in rows if row["benchmark"] == "kernels"]
    return {row["settings"].removeprefix("name="): row for row in measured if row["device"] == measured[-1]["device"]}


def _device(latest: Mapping[str, Row]) -> str:
    return next(iter(latest.values()))["device"]


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
    """Burnish's speed over that of each peer's fastest setting of the same side, in the same run."""
    if row["system"] != "burnish":
        return ""
    parts: list[str] = []
    for system, name in NAMES.items():
        same = [other for other in run if other["commit"] == row["commit"] and side_of(other) == side_of(row)]
        others = [other for other in same if other["system"] == system != "burnish"]
        if others:
            fastest = max(float(other["tokens_per_second"]) for other in others)
            parts.append(f"{float(row['tokens_per_second']) / fastest:.2f}x {name}")
    return ", ".join(parts)


def picture(rows: Sequence[Row]) -> str:
    """Speed against memory on the Llama-2-7B shape, rows of 2,048 tokens, on the device of the last run."""
    chosen = [
        (work, run)
        for work, run in runs(rows)
        if (work.benchmark, work.shape) == ("sft", "llama-2-7b")
        and work.storage in ("nf4", "bf16")
        and "alpaca" not in work.words
    ]
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
    main()
