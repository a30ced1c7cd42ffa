import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from burnish.model.linear import Linear
from burnish.model.storage import STORAGES, Dense
from burnish.report.folders import read_run
from burnish.report.results import compare, finish, method_name, num_parameters
from tests.unit.report.folders import METHODS, bare_run, finished_run


class Small(nn.Module):
    """An embedding of 10 x 64, two layers of 64 x 64 and a head that shares the embedding's weight."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(10, 64))
        self.layers = nn.ModuleList(Linear(STORAGES[storage].encode(torch.ones(64, 64))) for _ in range(2))
        tied = Dense(self.embed.detach(), trainable=False)
        tied.weight = self.embed
        self.head = Linear(tied)


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_are_counted_as_weights_however_they_are_kept(storage: str) -> None:
    model = Small(storage)
    assert num_parameters(model) == 10 * 64 + 2 * 64 * 64
    model.layers[0].adapters["policy"] = nn.Linear(64, 4)
    assert num_parameters(model) == 10 * 64 + 2 * 64 * 64 + 64 * 4 + 4


@pytest.mark.parametrize(
    ("storage", "kind", "name"),
    [
        ("full", "none", "Full fine-tuning"),
        ("full16", "none", "Full fine-tuning, bf16"),
        ("bf16", "lora", "LoRA"),
        ("fp32", "lora", "LoRA"),
        ("nf4", "lora", "QLoRA"),
        ("bf16", "dora", "DoRA"),
        ("nf4", "dora", "QDoRA"),
        ("bf16", "ia3", "IA³"),
        ("nf4", "ia3", "QIA³"),
    ],
)
def test_methods_have_the_names_people_use(storage: str, kind: str, name: str) -> None:
    assert method_name(storage, kind) == name


def test_what_was_learned_from_comes_after_what_was_trained() -> None:
    assert method_name("bf16", "lora", "DPO") == "LoRA + DPO"
    assert method_name("nf4", "lora", "reward model") == "QLoRA + reward model"
    assert method_name("full", "none", "PPO") == "Full + PPO"


def ended_run(is_main: bool) -> Any:
    """What `finish` sees of a Run: LoRA on a small model in 4 bits."""
    model = Small("nf4")
    model.layers[0].adapters["policy"] = adapter = nn.Linear(64, 4)
    parameters = dict(adapter.named_parameters())
    return SimpleNamespace(
        parameters=parameters,
        model=model,
        peak_bytes=4096,
        explained=None,
        seconds=2.5,
        mesh=SimpleNamespace(is_main=is_main),
    )


def test_finish_leaves_the_row_the_table_and_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before: dict[str, Any] = {"metrics": {"eval_loss": 3.0}, "samples": []}
    after: dict[str, Any] = {"metrics": {"eval_loss": 0.5}, "samples": []}
    row = finish(ended_run(is_main=True), tmp_path, "QLoRA", before, after)
    assert row == {
        "method": "QLoRA",
        "trainable_parameters": 64 * 4 + 4,
        "total_parameters": 10 * 64 + 2 * 64 * 64 + 64 * 4 + 4,
        "peak_memory_bytes": 4096,
        "seconds": 2.5,
        "metrics": {"eval_loss": 0.5},
        "before": {"eval_loss": 3.0},
        "run": tmp_path.name,
    }
    assert json.loads((tmp_path / "results.json").read_text()) == [row]
    text = (tmp_path / "table.md").read_text()
    assert "QLoRA      | 260 (2.9%)" in text
    printed = capsys.readouterr().out
    assert text in printed
    assert str(tmp_path / "report.html") in printed
    assert "<h1>QLoRA</h1>" in (tmp_path / "report.html").read_text()


def test_a_row_says_where_the_run_started_and_who_scored_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("from: runs/sft/adapter\n")
    after = {"metrics": {"eval_reward": 0.5}, "scorer": "a rule", "scores": [0.5]}
    row = finish(ended_run(is_main=True), tmp_path, "LoRA + DPO", {"metrics": {}}, after)
    assert (row["from"], row["scorer"]) == ("sft", "a rule")
    assert read_run(tmp_path).row == row


def test_what_held_the_memory_is_in_the_row_and_on_the_page(tmp_path: Path) -> None:
    run = ended_run(is_main=True)
    classes = {"weights": 3 * 2**20, "gradients": 0, "workspace": 2**20}
    run.explained = {"step": 2, "bytes": 2**22, "phase": "head", "graphs": True, "classes": classes}
    row = finish(run, tmp_path, "LoRA", {"metrics": {}}, {"metrics": {}})
    assert row["peak"] == run.explained
    page = " ".join((tmp_path / "report.html").read_text().split())
    for name, value in {"weights": "3.00 MiB", "gradients": "0", "together": "4.00 MiB", "of step": "2"}.items():
        assert f'<th scope="row">{name}</th><td>{value}</td>' in page
    assert "What CUDA graphs work in is in no tensor" in page
    run.explained["graphs"] = False
    finish(run, tmp_path, "LoRA", {"metrics": {}}, {"metrics": {}})
    assert "CUDA graphs" not in (tmp_path / "report.html").read_text()


def test_other_ranks_know_the_row_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = finish(ended_run(is_main=False), tmp_path, "QLoRA", {"metrics": {}}, {"metrics": {"eval_loss": 0.5}})
    assert row["metrics"] == {"eval_loss": 0.5}
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_compare_puts_runs_side_by_side(tmp_path: Path) -> None:
    folders = [finished_run(tmp_path / kind, kind, steps=5) for kind in METHODS]
    rows = compare(folders, tmp_path / "out")
    assert [row["method"] for row in rows] == ["Full fine-tuning", "LoRA", "QLoRA"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == rows
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 6
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>Full fine-tuning, LoRA and QLoRA</h1>" in page


def test_what_cannot_be_compared_is_said_in_one_line(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run")
    (tmp_path / "unfinished").mkdir()
    broken = bare_run(tmp_path / "broken")
    (broken / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2,, }\n')
    both = compare([run, run], tmp_path / "both")
    assert len(both) == 2
    cases = {
        "no run to compare: write runs=": ([], tmp_path / "out"),
        "there is no run folder .*missing": ([tmp_path / "missing"], tmp_path / "out"),
        "unfinished has no results.json.*save.resume=true": ([run, tmp_path / "unfinished"], tmp_path / "out"),
        "metrics.jsonl:2 is not JSON": ([broken], tmp_path / "out"),
        "does not hold the one row of a run": ([tmp_path / "both"], tmp_path / "out"),
        "run is the folder of a run.*write another out=DIR": ([run], run),
    }
    for message, (folders, out) in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            compare(folders, out)
        assert "\n" not in str(caught.value)


def test_the_tool_reports_runs_without_torch(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / kind, kind, steps=5) for kind in ("full", "lora")]
    code = (
        "import sys; from burnish.config import parse; from burnish.tools.report import Config, main;"
        "main(parse(Config, sys.argv[2:]), sys.argv[1] == 'json'); assert 'torch' not in sys.modules"
    )

    def report(form: str) -> str:
        words = [form, f"runs=[{runs[0]},{runs[1]}]", f"out={tmp_path / 'out'}", "title=Two"]
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout

    answer = json.loads(report("json"))
    assert [row["method"] for row in answer["runs"]] == ["Full fine-tuning", "LoRA"]
    assert "<h1>Two</h1>" in Path(answer["report"]).read_text()
    assert (tmp_path / "out" / "table.md").read_text() in report("text")
