"""What is kept of measurements: rows, what moved since the last ones, and the page that is made of them."""

import csv
import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import chart, compare, page, rows, sampler
from benchmarks.rows import COLUMNS, RESULTS, write_row
from burnish.report.charts import CHARACTER

SVG = {"s": "http://www.w3.org/2000/svg"}


def test_every_row_of_the_results_has_every_column(tmp_path: Path) -> None:
    with RESULTS.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert lines[0] == COLUMNS
    assert {len(line) for line in lines} == {len(COLUMNS)}
    write_row({"benchmark": "dpo", "versions": "one 1.0, two"}, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["benchmark"], row["versions"], row["shape"]) == ("dpo", "one 1.0, two", "")


def test_a_trial_on_a_cpu_is_kept_only_in_a_file_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(sampler, "WARM_UP", 0)
    monkeypatch.setattr(sampler, "TIMED", 1)
    few = ["shape=tiny", "prompts=1", "slots=1"]  # prompt and answer as they are: the shape has positions for them
    sampler.main(sampler.read_words(few))
    assert not (tmp_path / "results.csv").exists()
    *_, row, said = capsys.readouterr().out.splitlines()
    assert said == "a trial on a CPU: the row is not kept; results=FILE keeps it"
    assert " device=CPU " in row
    sampler.main(sampler.read_words([*few, "answer=8", f"results={tmp_path}/named.csv"]))
    assert [row["device"] for row in compare.read_rows(tmp_path / "named.csv")] == ["CPU"]
    write_row({"device": "NVIDIA H100"})
    assert [row["device"] for row in compare.read_rows(tmp_path / "results.csv")] == ["NVIDIA H100"]


def test_trials_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = compare.read_rows(RESULTS)
    kinds = {(row["benchmark"], row["shape"], row["storage"]): row for row in recorded}
    speed = {"commit": "c0ffee", "tokens_per_second": "3", "step_seconds": "9"}
    trials = [{**row, **speed, "device": "CPU"} for row in kinds.values()]
    assert page.filled(page.BEGIN + page.END, [*recorded, *trials]) == page.filled(page.BEGIN + page.END, recorded)
    assert page.picture([*recorded, *trials]) == page.picture(recorded)
    for row in (*rows_like("burnish", {}, {}), *trials):
        write_row(row, tmp_path / "rows.csv")
    with pytest.raises(SystemExit) as stopped:
        compare.main({"new": "", "results": str(tmp_path / "rows.csv")})
    assert stopped.value.code == 0
    assert "nothing moved by more than 5 %" in capsys.readouterr().out


RECORDED = 24
"""Rows of results.csv that tests hold on to; later ones come and go."""


def rows_like(system: str, *changes: dict[str, str]) -> list[dict[str, str]]:
    """The last of those rows with a system's DPO, changed in turn."""
    rows = compare.read_rows(RESULTS)[:RECORDED]
    recorded = [row for row in rows if (row["benchmark"], row["system"]) == ("dpo", system)]
    return [{**recorded[-1], **change} for change in changes]


def test_rows_of_the_last_commit_are_paired_with_the_same_work_before() -> None:
    rows = compare.read_rows(RESULTS)[:12]
    pairs = compare.pairs_of(rows, None)
    assert pairs == list(zip(rows[4:8], rows[8:], strict=True))
    lines = [line for before, after in pairs if before for line in compare.moves(before, after)]
    slower = "tokens_per_second 14340 -> 12491, -12.9 %: worse"
    assert len([line for line in lines if line.endswith(slower)]) == 1
    assert not [line for line in lines if "peak_allocated" in line]
    assert len({line.partition(":")[0] for line in lines}) == 4  # as many as rows: none reads like another
    last = [*rows, {**rows[3], "commit": "c0ffee"}, {**rows[0], "commit": "c0ffee", "settings": "other"}]
    assert [before for before, _ in compare.pairs_of(last, None)] == [rows[3], None]


def test_steps_of_other_sizes_are_other_work() -> None:
    (double, before, near) = rows_like("unsloth", *({"tokens_per_step": size} for size in ("8192", "4096", "4100")))
    ((found, _),) = compare.pairs_of([before, double], [near])
    assert found == before
    assert compare.pairs_of([double], [near]) == [(None, near)]


def memory_row(settings: str, **figures: str) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "") | {"benchmark": "memory", "system": "burnish", "settings": settings} | figures


def test_what_fits_in_one_of_two_rows_is_told() -> None:
    fits = memory_row("row=full", tokens_per_step="2048", step_seconds="1.0", tokens_per_second="2048")
    misfits = memory_row("row=full", note="out of memory under 20GiB: Tried to allocate 2 MiB")
    for before, after, said in ((fits, misfits, "no longer fits: worse"), (misfits, fits, "fits now: better")):
        assert compare.pairs_of([before], [after]) == [(before, after)]
        (line,) = compare.moves(before, after)
        assert line.endswith(f": {said}")
    assert compare.moves(misfits, misfits) == []


def test_a_file_without_its_line_of_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("".join(RESULTS.read_text().splitlines(keepends=True)[1:3]))
    with pytest.raises(ValueError, match=r"rows.csv has no column date: its first line is to be that of results.csv$"):
        compare.read_rows(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"rows.csv has no column date"):
        compare.read_rows(path)


def test_a_row_without_a_number_where_one_belongs_is_named(tmp_path: Path) -> None:
    first, row = RESULTS.read_text().splitlines(keepends=True)[:2]
    path = tmp_path / "rows.csv"
    path.write_text("\ufeff" + first + row, encoding="utf-8")  # as spreadsheets write it
    (found,) = compare.read_rows(path)
    path.write_text(first + row.replace(f",{found['step_seconds']},", ",n/a,"))
    with pytest.raises(ValueError, match=r"rows.csv, row 2: step_seconds=n/a is no number: mend or delete the row$"):
        compare.read_rows(path)


def test_rows_go_into_new_folders_and_empty_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.touch()
    for path in (tmp_path / "new" / "rows.csv", empty):
        write_row({"benchmark": "dpo"}, path)
        assert [row["benchmark"] for row in compare.read_rows(path)] == ["dpo"]


def test_the_longest_sequence_is_compared_by_its_length() -> None:
    long, longer = (
        memory_row("row=longest cap=24GB", tokens_per_step=length, step_seconds="9", tokens_per_second=speed)
        for length, speed in (("65536", "6000"), ("81920", "4666"))
    )
    assert compare.pairs_of([long], [longer]) == [(long, longer)]
    assert [line.rpartition(", ")[2] for line in compare.moves(long, longer)] == ["+25.0 %: better"]
    assert [line.rpartition(", ")[2] for line in compare.moves(longer, long)] == ["-20.0 %: worse"]


@pytest.mark.parametrize(
    ("system", "change", "status", "said"),
    [
        ("burnish", {"tokens_per_second": "10000"}, 1, "-10.8 %: worse"),
        ("burnish", {"peak_allocated_gib": "25.00"}, 1, "peak_allocated_gib 20.73 -> 25, +20.6 %: worse"),
        ("burnish", {"tokens_per_second": "10700"}, 0, "nothing moved by more than 5 %"),
        ("burnish", {"tokens_per_second": "20000"}, 0, ": better"),
        ("burnish", {"compile_seconds": "99.0"}, 0, "compile_seconds 15.9 -> 99, +522.6 %: noted"),
        ("unsloth", {"tokens_per_second": "100"}, 0, ": noted"),
        ("burnish", {"device": "NVIDIA H100 80GB HBM3", "tokens_per_second": "1"}, 0, "none of the 1 new rows was"),
    ],
)
def test_new_rows_are_held_against_the_last(tmp_path: Path, capsys, system, change, status, said) -> None:
    with RESULTS.open(encoding="utf-8") as file:
        (tmp_path / "recorded.csv").write_text("".join(itertools.islice(file, 1 + RECORDED)), encoding="utf-8")
    elsewhere = {"device": change.get("device", "NVIDIA H200")}
    for row in rows_like(system, {"tokens_per_second": "99999", **elsewhere}, change):  # the last of a work counts
        write_row(row, tmp_path / "new.csv")
    with pytest.raises(SystemExit) as stopped:
        compare.main({"new": str(tmp_path / "new.csv"), "results": str(tmp_path / "recorded.csv")})
    assert stopped.value.code == status
    assert said in capsys.readouterr().out


def test_kernels_are_compared_by_their_time() -> None:
    row = dict.fromkeys(COLUMNS, "") | {"benchmark": "kernels", "system": "burnish", "settings": "name=nf4"}
    (line,) = compare.moves({**row, "step_seconds": "0.000100"}, {**row, "step_seconds": "0.000110"})
    assert line.endswith("step_seconds 0.0001 -> 0.00011, +10.0 %: worse")


def test_the_page_is_made_from_the_results() -> None:
    rows = compare.read_rows(RESULTS)
    text = (page.DOCS / "performance.md").read_text(encoding="utf-8")
    again = "docs/performance.md is older than results.csv: run python -m benchmarks.page"
    assert page.filled(text, rows) == text, again
    assert page.picture(rows) == (page.DOCS / "performance.svg").read_text(encoding="utf-8"), again


def test_the_page_takes_the_last_run_beside_peers_and_compares_within_a_side() -> None:
    ours, theirs = rows_like("burnish", {}), rows_like("unsloth", {})
    work = {"benchmark": "sft", "shape": "llama-2-7b", "storage": "nf4", "checkpointing": ""}

    def row(like: dict[str, str], side: str, speed: str, commit: str, **more: str) -> dict[str, str]:
        told = f"side={side} memory=auto fp8=false lengths=fixed sequences=4 length=2048"
        return {**like, **work, "settings": told, "tokens_per_second": speed, "commit": commit, **more}

    rows = [
        row(ours[0], "lean", "14000", "0"),  # of that day, with settings that had no turn in the last run
        row(theirs[0], "lean", "9999", "0", checkpointing="True"),
        row(ours[0], "lean", "77777", "older", date="2026-01-01"),
        row(ours[0], "fast", "18000", "a"),
        row(theirs[0], "fast", "15000", "a", checkpointing="False"),
        row(theirs[0], "lean", "10000", "a", checkpointing="True"),
        row(ours[0], "fast", "18600", "a"),  # measured again in that run
        row(ours[0], "fast", "99999", "b"),  # alone: no ratio of one run
    ]
    ((found, run),) = page.runs(rows)
    assert [one["tokens_per_second"] for one in run] == ["14000", "18600", "15000", "10000"]
    lines = page.table(found, run)
    assert lines[0] == "### QLoRA: llama-2-7b"
    assert "18,600" in lines[6]
    assert lines[6].endswith("| 1.24x Unsloth |")
    assert [line.count("x Unsloth") for line in lines[7:]] == [0, 0, 0]
    assert [line.split(" | ")[0] for line in lines[6:]] == ["| Burnish", "| Unsloth", "| Burnish (0)", "| Unsloth"]


def test_a_peer_that_was_faster_in_another_run_has_no_ratio() -> None:
    work = {"benchmark": "sft", "settings": "side=ragged lengths=alpaca", "checkpointing": ""}
    (ours,) = rows_like("burnish", {**work, "tokens_per_second": "20000", "commit": "a"})
    slow, packed = rows_like("unsloth", *({**work, "tokens_per_second": speed} for speed in ("2000", "12500")))
    slow["commit"] = "a"
    assert page.beside(ours, [ours, slow]) == "10.00x Unsloth"
    for commit, said in (("b", ""), ("a", "1.60x Unsloth")):
        assert page.beside(ours, [{**packed, "commit": commit}, ours, slow]) == said
    slower = {**packed, "commit": "b", "tokens_per_second": "1000"}
    lean = {**packed, "commit": "b", "settings": "side=lean"}
    trl = {**packed, "commit": "b", "system": "trl"}
    assert page.beside(ours, [slower, lean, trl, ours, slow]) == "10.00x Unsloth"


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ("", "0"),
        ("rounds 12.392", "1"),
        ("rounds 19892 19891", "2"),
        ("rounds 100 105; 2 of 9", "2"),
        ("rounds 20940 19124", "2 (19,124 to 20,940)"),
        ("rounds 6.279 5.489 6.000; corrected", "3 (5.489 to 6.279)"),
    ],
)
def test_rounds_that_differ_are_told(note: str, said: str) -> None:
    assert page.rounds_of({"note": note}) == said


def kernel_rows(taken: dict[str, str], **more: str) -> list[dict[str, str]]:
    about = {"benchmark": "kernels", "device": "NVIDIA H100", "commit": "b", **more}
    return rows_like(
        "burnish", *({"settings": f"name={name}", "step_seconds": t, **about} for name, t in taken.items())
    )


def test_the_page_has_a_line_of_attention_for_each_batch() -> None:
    older = kernel_rows(
        {"attention 7, alpha": "0.004", "attention 2x8, alpha": "9", "attention 9, beta": "1"}, commit="a"
    )
    names = {"attention 2x8, alpha": "0.000100", "attention backward 2x8, alpha": "0.000200"}
    halves = {"attention 9, beta": "0.003", "attention backward 9, alpha": "0.001"}
    mixed = kernel_rows({"attention 5, alpha": "0.001"}, commit="a") + kernel_rows({"attention 5, beta": "0.002"})
    lines = page.attention([*older, *mixed, *kernel_rows(names | halves)])
    assert lines[2].partition(",")[2].startswith(" commit b, PyTorch ")
    assert lines[4:] == [
        "| sequences | alpha | beta |",
        "| --- | ---: | ---: |",
        f"| 7 (a) | 4.000 + {page.MISSING} |  |",
        "| 2x8 | 0.100 + 0.200 |  |",
        f"| 9 | {page.MISSING} + 1.000 | 3.000 + {page.MISSING} |",
        f"| 5 (a, b) | 1.000 + {page.MISSING} | 2.000 + {page.MISSING} |",
    ]
    assert page.kernels(older) == page.attention([]) == []


def test_a_copy_alone_is_no_table() -> None:
    copy = kernel_rows({"copy": "0.0002"})
    assert page.kernels(copy) == []
    assert [line.split(" | ")[0] for line in page.kernels([*copy, *kernel_rows({"outer": "0.0003"})])[4:]] == [
        "| copy",
        "| outer",
    ]


def test_each_device_has_its_own_tables() -> None:
    names = {"attention 2x8, alpha": "0.0001", "outer": "0.0002"}
    measured = kernel_rows(names) + kernel_rows(names, device="NVIDIA H200")
    text = page.filled(page.BEGIN + page.END, measured)
    assert [line.rpartition(": ")[2] for line in text.splitlines() if line.startswith("###")] == [
        *("NVIDIA H100", "NVIDIA H200") * 2
    ]
    assert text.count("| outer | 0.2000 |") == text.count(f"| 2x8 | 0.100 + {page.MISSING} |") == 2


def test_the_page_takes_no_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "DOCS", tmp_path)
    with pytest.raises(ValueError, match=r"^x=1 is not known: nothing can be asked for$"):
        page.main(["x=1"])


def labels_of(dots: list[chart.Dot]) -> list[tuple[str, float, float, float]]:
    """The labels of points as (anchor, left, right, height)."""
    svg = ElementTree.fromstring(chart.scatter(dots, page.LIMITS, "speed"))
    found: list[tuple[str, float, float, float]] = []
    for text in svg.iterfind("s:text", SVG):
        if text.text in {dot.label for dot in dots}:
            at, width = float(text.attrib["x"]), CHARACTER * len(text.text or "")
            anchor = text.attrib["text-anchor"]
            begin = at - width if anchor == "end" else at
            found.append((anchor, begin, begin + width, float(text.attrib["y"])))
    assert len(found) == len(dots)
    return found


@pytest.mark.parametrize("speed", [100, 18_000, 49_000])
def test_labels_of_a_crowd_stay_apart_and_in_the_frame(speed: int) -> None:
    labels = labels_of([chart.Dot("burnish", "memory=auto", 20 + i / 10, speed + i, False) for i in range(8)])
    for one, two in itertools.combinations(labels, 2):
        assert one[2] <= two[1] or two[2] <= one[1] or abs(one[3] - two[3]) >= chart.LINE - 0.1
    assert {anchor for anchor, *_ in labels} == {"start", "end"}
    assert all(10 < height < chart.HEIGHT - chart.LEGEND - 34 for *_, height in labels)


def test_a_label_keeps_off_the_edges_and_the_marks_of_others() -> None:
    (first, _, _, _), (last, _, _, _) = labels_of(
        [chart.Dot("trl", "kept", 0.0, 9_000, True), chart.Dot("trl", "kept", 60.0, 9_000, True)]
    )
    assert (first, last) == ("start", "end")
    (fast, *_), (slow, *_) = labels_of(
        [chart.Dot("trl", "kept", 30.0, 9_000, True), chart.Dot("trl", "kept", 31.5, 9_000, True)]
    )
    assert (fast, slow) == ("end", "start")  # the other's mark is where the first one's label would be


def test_a_picture_without_rows_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results.csv")
    (tmp_path / "results.csv").write_text(RESULTS.read_text().splitlines(keepends=True)[0])
    (tmp_path / "performance.md").write_text("figures")
    with pytest.raises(ValueError, match=r"^results.csv has no row of LoRA on llama-2-7b to draw: measure with "):
        page.main([])
    assert (tmp_path / "performance.md").read_text() == "figures"


def test_the_picture_has_a_mark_for_each_row_and_the_limits_of_arithmetic() -> None:
    bf16, fp8 = page.LIMITS
    assert (round(bf16.speed, -2), round(fp8.speed, -2)) == (27_700, 45_800)
    dots = [
        chart.Dot("burnish", "memory=auto", 37.3, 18_000, False),
        chart.Dot("unsloth", "kept", 37.4, 18_050, True),
        chart.Dot("trl", "kept", 59.9, 9_000, True),
    ]
    svg = ElementTree.fromstring(chart.scatter(dots, page.LIMITS, "speed & memory"))
    assert svg.findtext("s:title", namespaces=SVG) == "speed & memory"
    marks = [
        mark.findtext("s:title", namespaces=SVG)
        for kind in ("circle", "rect")
        for mark in svg.iterfind(f"s:{kind}", SVG)
    ]
    assert {mark for mark in marks if mark} == {"Burnish, memory=auto", "Unsloth, kept", "TRL, kept"}
