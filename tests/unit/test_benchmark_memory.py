"""Memory under a cap: every row can be measured, what does not fit is said, and the longest sequence is found."""

import csv
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import checkpoints, compare, dpo, memory, memory_run, page
from benchmarks.memory_rows import MOST, ROWS, UNIT, Row, longest, sized
from benchmarks.turns import Clock, Failed, Worker
from burnish.data.comparing import collate_comparisons
from burnish.engine.mesh import Mesh
from burnish.settings import memory_bytes

CPU = Mesh(torch.device("cpu"))
READING = {"seconds": [0.5], "tokens": 2048, "first": 3.0, "allocated": 4.25, "reserved": 4.375, "notes": ["a", ""]}
PROBLEM = {"problem": "one sequence, 2,048 tokens, is too much by itself; at most 4.10 GiB were allocated"}
SYSTEM = """
import sys
from benchmarks.turns import listen, say
say({"versions": "one 1.0"})
while (request := listen()) is not None:
    if request["row"]["storage"] == "full16":
        print("KeyError: a mistake", file=sys.stderr)
        sys.exit(3)
    say({"seconds": [0.5], "tokens": 64, "first": 3.0, "allocated": 4.25, "reserved": 4.375})
"""


class Timed(Clock):
    """A clock that only work moves on."""

    def __init__(self, allowance: float) -> None:
        self.seconds = allowance

    def left(self) -> float:
        return max(self.seconds, 0.0)


@given(st.integers(0, 200_000), st.sampled_from([4096, 32768, 65536]))
@settings(deadline=None)
def test_the_longest_sequence_is_found_wherever_it_lies(fitting: int, first: int) -> None:
    tried: list[int] = []

    def measure(length: int) -> str | None:
        tried.append(length)
        return f"{length} tokens" if length <= fitting else None

    best, found, ended = longest(measure, first, MOST, UNIT, Clock(60))
    assert best == min(fitting, MOST) // UNIT * UNIT
    assert (found, ended) == (f"{best} tokens" if best else None, "")
    assert len(set(tried)) == len(tried) <= 11
    assert all(length % UNIT == 0 for length in tried)


def test_a_length_is_not_tried_that_the_clock_leaves_no_time_for() -> None:
    clock, tried = Timed(60.0), list[int]()

    def measure(length: int) -> int:
        tried.append(length)
        clock.seconds -= 10 * (length / 32768) ** 2
        return length

    # 10 s, then 40; 128 Ki tokens would take 160 of the 10 that are left.
    assert longest(measure, 32768, MOST, UNIT, clock) == (
        65536,
        65536,
        "131,072 tokens were not tried, for want of time",
    )
    assert tried == [32768, 65536]


def asked(*words: str) -> dict[str, str]:
    return memory.read_words([*words])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rows=qlora", f"^rows=qlora is not known: write one or more of {','.join(ROWS)}$"),
        ("rows=full,longst", r"^rows=longst is not known: did you mean longest\?$"),
        ("cap=48", "^cap=48 is no amount: write own, none, or an amount such as 48GB or 5.2GiB$"),
        ("cap=least", "^cap=least is no amount: "),
        ("memory=lots", "^run.memory=lots is no amount: "),
        ("most=0", "^most=0 must be a whole number above 0$"),
    ],
)
def test_a_word_that_cannot_be_is_named(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(word)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_can_be_measured(tmp_path: Path, name: str) -> None:
    row = sized(ROWS[name], "tiny")
    assert memory_bytes(ROWS[name].cap) is not None
    if row.kind == "ppo":
        checkpoints.main("tiny", tmp_path / "model")
    reading = memory_run.measured(row, asked(f"scratch={tmp_path}", "cap=none"), CPU)
    assert reading["tokens"] == row.tokens
    assert min(reading["first"], *reading["seconds"]) > 0
    if row.kind in ("sft", "dpo"):  # the others are counted on a card alone, or by the recipe
        assert reading["allocated"] * 2**30 > 50_000
        held = dict(zip(*[iter(reading["notes"][0].partition(": ")[2].split())] * 2, strict=True))
        assert list(held) == ["weights", "adapters", "gradients", "optimizer", "activations", "head", "workspace"]
        assert reading["notes"][2].startswith("loaded in ")
    columns = memory.columns_of(name, row, asked(), reading)
    assert float(str(columns["step_seconds"])) == pytest.approx(sum(reading["seconds"]) / len(reading["seconds"]), 0.01)
    assert bool(columns["phases"]) == (row.kind == "ppo")


def test_a_micro_batch_holds_a_step_and_no_more(tmp_path: Path) -> None:
    row = ROWS["dpo-qlora"]
    pairs = dpo.random_comparisons(2, 512, 512, 32000, seed=0)
    config = memory_run.settings_of(row, asked(), tmp_path, [])
    assert config.run.microbatch_tokens == len(collate_comparisons(pairs).tokens) == 3074
    assert (config.adapter.rank, config.optim.kind, config.run.memory) == (16, "adamw8bit", "least")
    assert (row.tokens, ROWS["qlora-4x2048"].tokens, ROWS["ppo-nf4"].tokens) == (4096, 8192, 8192)
    config = memory_run.settings_of(ROWS["qlora-65b"], asked("also=run.dtype=fp8 optim.clip=0"), tmp_path, [])
    assert (config.run.dtype, config.optim.clip, config.adapter.rank) == ("fp8", 0, 64)
    assert memory_run.settings_of(ROWS["full"], asked(), tmp_path, []).adapter.kind == "none"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has a total of"), "Tried to"),
        (ValueError("run.memory=least: 4.2GB of this device can be used, too little"), "run.memory=least: 4.2GB"),
        (MemoryError("out of memory at step 2: one sequence"), "at step 2: one sequence"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not_fit_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(memory_run, "try_out", fail)
    reading = memory_run.measured(sized(ROWS["full"], "tiny"), asked("cap=none"), CPU)
    assert reading["problem"].startswith(said)
    assert "GPU 0" not in reading["problem"]


def test_a_mistake_is_not_taken_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("adapter.rank=0 must be at least 1")

    monkeypatch.setattr(memory_run, "try_out", fail)
    with pytest.raises(ValueError, match=r"^adapter\.rank=0"):
        memory_run.measured(sized(ROWS["full"], "tiny"), asked("cap=none"), CPU)


def test_rows_with_figures_and_without() -> None:
    row, words = ROWS["qlora-1x2048"], asked("note=again", "also=run.dtype=fp8")
    fits = memory.columns_of("qlora-1x2048", row, words, READING | {"versions": "one 1.0"})
    assert fits["settings"] == (
        "row=qlora-1x2048 cap=4.4GiB memory=least optimizer=adamw8bit sequences=1 length=2048 run.dtype=fp8"
    )
    figures = ("step_seconds", "tokens_per_second", "peak_allocated_gib", "peak_reserved_gib", "compile_seconds")
    assert [fits[key] for key in figures] == ["0.5000", "4096", "4.25", "4.38", "3.0"]
    assert (fits["note"], fits["versions"], fits["rank"]) == ("a; again", "one 1.0", 16)
    assert memory.told_of(fits) == "4.25 GiB allocated, 4.38 GiB reserved, 4096 tokens/s"
    misfits = memory.columns_of("qlora-1x2048", row, words, PROBLEM)
    assert not set(figures) & set(misfits)
    assert misfits["note"] == f"out of memory under 4.4GiB: {PROBLEM['problem']}; again"
    assert memory.told_of(misfits) == misfits["note"]
    assert misfits["settings"] == fits["settings"]  # it is the same work
    other = memory.columns_of("full", ROWS["full"], asked("cap=none"), PROBLEM)
    assert str(other["note"]).startswith("out of memory: one")
    assert " cap=none " in str(other["settings"])


def search(fits: int, words: list[str], broken: bool = False) -> dict[str, Any]:
    def ask(name: str, row: Row) -> dict[str, Any]:
        if broken:
            raise Failed("ended with exit status -9; it left no words")
        return READING | {"tokens": row.length} if row.length <= fits else PROBLEM

    return memory.searched("longest", ROWS["longest"], asked(*words), Clock(60), ask)


def test_a_search_gives_what_was_measured_of_the_longest() -> None:
    reading = search(100_000, [])
    columns = memory.columns_of("longest", ROWS["longest"], asked(), reading)
    assert columns["tokens_per_step"] == 98304
    assert "length" not in str(columns["settings"])  # what is found is no part of the work
    assert search(100_000, ["most=65536"])["tokens"] == 65536
    assert search(100, []) == PROBLEM
    with pytest.raises(Failed, match="exit status -9"):
        search(0, [], broken=True)


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    def open_worker(words: list[str], log: Path) -> Worker:
        env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        return Worker([sys.executable, "-c", source], log, env, folder)

    monkeypatch.setattr(memory, "open_ours", open_worker)


def test_rows_are_written_as_they_come_and_one_that_breaks_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(monkeypatch, tmp_path, SYSTEM)
    words = ["shape=tiny", f"scratch={tmp_path}", f"results={tmp_path}/rows.csv", "commit=c0ffee", "seconds=200"]
    memory.main(asked(*words, "rows=qlora-4x2048,full,qlora-1x2048,longest"))
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [page.words_of(row)["row"] for row in rows] == ["qlora-4x2048", "qlora-1x2048"]
    assert {(row["benchmark"], row["versions"], row["commit"]) for row in rows} == {("memory", "one 1.0", "c0ffee")}
    said = capsys.readouterr().out
    assert "\nqlora-1x2048: 4.25 GiB allocated, 4.38 GiB reserved, 128 tokens/s\n" in said
    assert "full is left out: it ended with exit status 3; its last words: KeyError: a mistake" in said
    assert "longest is not begun: it may take 240 s, " in said


def test_a_process_measures_what_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["shape=tiny", f"scratch={tmp_path}", f"results={tmp_path}/rows.csv", "commit=c0ffee"]
    memory.main(asked(*words, "rows=full,longest"))
    full, found = compare.read_rows(tmp_path / "rows.csv")
    assert (full["storage"], full["adapter"], full["tokens_per_step"]) == ("full16", "none", "64")
    assert found["tokens_per_step"] == "160"  # the longest that is tried
    assert {page.words_of(row)["cap"] for row in (full, found)} == {"none"}  # nothing is capped on a CPU
    assert 0.0001 < float(full["peak_allocated_gib"]) < 0.1
    assert (full["peak_reserved_gib"], found["peak_allocated_gib"], found["peak_reserved_gib"]) == ("", "", "")
    assert (tmp_path / "memory.log").read_text().startswith("host: ")


def test_what_the_host_lends_while_a_model_is_loaded() -> None:
    with memory_run.watched(every=0.002) as host:
        held = b"1" * 2**26
        time.sleep(0.1)
        loaded = time.perf_counter() - host.began
        more = b"2" * 2**27
        time.sleep(0.1)
    assert 0.9 * 2**26 < host.growth(loaded) < 1.6 * 2**26
    assert host.growth(60.0) > 0.9 * (len(held) + len(more))
    assert host.growth(0.0) == 0


def row_of(name: str, cap: str, speed: str, **more: str) -> dict[str, str]:
    told = f"row={name} cap={cap} memory=least optimizer=adamw8bit sequences=1 length=2048"
    figures = {"tokens_per_second": speed, "peak_allocated_gib": speed and "4.25", "peak_reserved_gib": speed and "4.4"}
    about = {"benchmark": "memory", "device": "NVIDIA H100", "settings": told, "commit": "c0ffee", "note": ""}
    return about | figures | more


def test_the_page_has_a_line_for_each_row_and_cap() -> None:
    rows = [
        row_of("qlora-65b", "48GB", "1500"),
        row_of("qlora-1x2048", "4.4GiB", "", note="out of memory under 4.4GiB: Tried to allocate 2 MiB"),
        row_of("qlora-1x2048", "4.6GiB", "9000"),
        row_of("qlora-65b", "48GB", "1612"),  # measured again
        row_of("longest", "24GB", "4000", tokens_per_step="90112", step_seconds="22.5280")
        | {"note": "activations on the host: 62.48 GiB"},
    ]
    lines = page.memory(rows)
    how = "memory=least optimizer=adamw8bit"
    assert lines[0] == "### Memory: NVIDIA H100"
    assert lines[4:] == [
        f"| QLoRA 7B, 1 x 2,048 |  | 4.4 GiB |  |  |  |  | 4.4GiB | out of memory under 4.4GiB; {how} | c0ffee |",
        f"| QLoRA 7B, 1 x 2,048 |  | 4.4 GiB | 4.25 | 4.4 |  | 9,000 | 4.6GiB | {how} | c0ffee |",
        "| QLoRA 65B, rank 64, 1 x 2,048 | 48 GB | 48 GB, at 1,400 tokens/s or more | 4.25 | 4.4 |  | 1,612 | 48GB | "
        f"{how} | c0ffee |",
        "| the longest sequence with QLoRA 8B | Unsloth: 78k tokens in 24 GB | 80,000 tokens or more in 24 GB | 4.25 | "
        f"4.4 | 62.48 | 4,000 | 24GB | 90,112 tokens, 22.5 s a step; {how} | c0ffee |",
    ]
    assert {line.count("|") for line in lines[2:]} == {11}
    assert page.memory([]) == []
    text = page.filled(page.BEGIN + page.END, [*rows, row_of("full", "20GiB", "9000", device="NVIDIA H200")])
    assert "\n".join(lines) in text
    assert "### Memory: NVIDIA H200" in text
