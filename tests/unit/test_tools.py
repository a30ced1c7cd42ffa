"""The tools on the embedded model: what they print, and that --json is one JSON object and nothing else."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from burnish.cli import main
from burnish.engine.preflight import cuda_device_count
from burnish.model.families import EMBEDDED
from burnish.tools.demo import STAGES
from tests.tiny import instead


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: a LoRA adapter on the embedded base."""
    folder = tmp_path_factory.mktemp("tools") / "run"
    words = ["data.path=embedded", "data.limit=200", "data.max_length=128", f"run.folder={folder}", "save.trackers=[]"]
    words += ["run.steps=3", "run.step_tokens=512", "run.microbatch_tokens=512", "adapter.rank=4", "optim.lr=0.002"]
    assert main(["sft", *words]) == 0
    return folder


def as_json(capsys, *words: str):
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_doctor(capsys):
    found = as_json(capsys, "doctor")
    assert found["training"]["works"]
    assert "torch" in found["packages"]["says"]


def test_generate_asks_base_and_adapter(capsys, run):
    base = as_json(capsys, "generate", "model.path=embedded", "prompt=[Add 2 and 3., Spell cat.]", "max_tokens=8")
    trained = as_json(capsys, "generate", f"model.adapter={run}", "prompt=[Add 2 and 3., Spell cat.]", "max_tokens=8")
    assert [answer["prompt"] for answer in base["answers"]] == ["Add 2 and 3.", "Spell cat."]
    assert base != trained


def test_generate_continues_plain_text_as_the_base_learned_it(capsys):
    words = ["model.path=embedded", "chat=false", "max_tokens=4"]
    (found,) = as_json(capsys, "generate", *words, "prompt=' Exercise: Spell cat. Answer:'")["answers"]
    assert found["answer"].startswith("c a t")


def test_the_same_seed_draws_the_same_and_alone_as_in_company(capsys):
    def drawn(prompt: str, seed: int):
        words = ["model.path=embedded", "chat=false", "max_tokens=12", "temperature=1.5", f"seed={seed}", prompt]
        return [found["answer"] for found in as_json(capsys, "generate", *words)["answers"]]

    assert drawn("prompt=' The cat'", 1) == drawn("prompt=' The cat'", 1)
    assert drawn("prompt=' The cat'", 1) != drawn("prompt=' The cat'", 2)
    assert drawn("prompt=' The cat'", 1)[0] == drawn("prompt=[' The cat', ' The dog is a']", 1)[0]


def test_generate_draws_as_it_is_told(capsys):
    words = ["generate", "model.path=embedded", "chat=false", "prompt=[' The cat', ' The dog']", "max_tokens=12"]

    def answers(*more: str):
        return [found["answer"] for found in as_json(capsys, *words, *more)["answers"]]

    greedy, drawn = answers(), answers("temperature=1.5", "samples=3")
    assert len(set(drawn)) == 6
    assert drawn[:2] == answers("temperature=1.5", "samples=2")[:2]
    for narrow in ("top_k=1", "top_p=0.0001"):
        assert answers("temperature=1.5", narrow) == greedy
    for found, whole in zip(answers("stop=[a,o]"), greedy, strict=True):
        assert found == whole[: min(whole.index(letter) for letter in "ao" if letter in whole)].strip()
    assert "stop: an empty text" in complaint(capsys, *words, 'stop=[""]')
    assert "go beyond the 1024 positions" in complaint(capsys, *instead(words, "max_tokens=2000"))


def test_eval_does_not_depend_on_its_batches(capsys, run):
    words = ["eval", f"model.adapter={run}", "data.path=embedded", "data.limit=60", "data.max_length=128"]
    small = as_json(capsys, *words, "microbatch_tokens=128")
    large = as_json(capsys, *words, "microbatch_tokens=4096")
    assert small["metrics"] == pytest.approx(large["metrics"], rel=1e-5)
    assert set(small["metrics"]) >= {"eval_loss", "eval_perplexity"}


def test_eval_grades_answers_by_task(capsys, run):
    words = ["eval", f"model.adapter={run}", "data.path=embedded", "data.limit=60", "data.max_length=128"]
    found = as_json(capsys, *words, "prompts=12", "max_tokens=8", "general=embedded")
    assert 0 <= found["metrics"]["eval_exact_match"] <= 1
    assert found["metrics"]["eval_general_loss"] < 2
    assert len(found["by_task"]) > 1
    assert {"task", "prompt", "reference", "answer", "correct"} == found["samples"][0].keys()


def test_merge_reports_its_error_and_the_result_answers(capsys, run, tmp_path):
    report = as_json(capsys, "merge", f"model.adapter={run}", f"out={tmp_path / 'merged'}")
    assert report["same_argmax"] > 0.9
    assert load_file(tmp_path / "merged" / "model.safetensors")
    found = as_json(capsys, "generate", f"model.path={tmp_path / 'merged'}", "prompt=Spell cat.", "max_tokens=4")
    assert len(found["answers"]) == 1


def test_data_audit(capsys):
    found = as_json(capsys, "data", "audit", "data.path=embedded", "data.limit=50", "model.path=embedded")
    assert found["rows_in"] == 50


def test_the_quick_demo_compares_all_methods_and_can_be_repeated(capsys, tmp_path, monkeypatch):
    words = ["demo", f"out={tmp_path / 'demo'}", "quick=true"]
    found = as_json(capsys, *words)["runs"]
    after = ["LoRA + DPO", "LoRA + reward model", "LoRA + PPO"]
    assert [row["method"] for row in found] == ["Full fine-tuning", "LoRA", "QLoRA", *after]
    full, lora, qlora = found[:3]
    assert [row.get("from") for row in found] == [None, None, None, "lora", "lora", "lora"]
    assert full["trainable_parameters"] == full["total_parameters"] > 10 * lora["trainable_parameters"]
    assert full["peak_memory_bytes"] > lora["peak_memory_bytes"] > qlora["peak_memory_bytes"]
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == found
    assert "<svg" in (tmp_path / "demo" / "report.html").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("burnish.tools.demo.STAGES", {"qlora": STAGES["qlora"]})
        assert len(as_json(capsys, *words)["runs"]) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    assert main(["demo", f"out={tmp_path / 'mine'}", "quick=true"]) == 1
    assert (tmp_path / "mine" / "notes.txt").exists()


def complaint(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_an_adapter_is_not_put_on_another_base(capsys, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(EMBEDDED, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"] * 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    words = [f"model.path={other}", f"model.adapter={run}", "prompt=Spell cat."]
    assert "was trained on another base" in complaint(capsys, "generate", *words)
    assert "was trained on another base" in complaint(capsys, "merge", *words[:2], f"out={tmp_path / 'merged'}")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_is_asked_on_the_storage_it_was_trained_on(capsys, tmp_path):
    words = ["data.path=embedded", "data.limit=100", "data.max_length=128", f"run.folder={tmp_path / 'run'}"]
    words += ["run.steps=1", "run.step_tokens=512", "save.trackers=none", "model.storage=nf4", "evaluate.fraction=0"]
    assert main(["sft", *words]) == 0
    asked = ["eval", f"model.adapter={tmp_path / 'run'}", "data.path=embedded", "data.limit=30", "data.max_length=128"]
    by_itself = as_json(capsys, *asked)["metrics"]["eval_loss"]
    assert by_itself == as_json(capsys, *asked, "model.storage=nf4")["metrics"]["eval_loss"]
    assert by_itself != as_json(capsys, *asked, "model.storage=bf16")["metrics"]["eval_loss"]


def test_what_is_named_in_the_wrong_place_says_where_it_belongs(capsys, run):
    assert f"write model.adapter={run}" in complaint(capsys, "generate", f"model.path={run}", "prompt=hi")
    if cuda_device_count() == 0:
        asked = ["generate", "model.path=embedded", "model.device=cuda", "prompt=a"]
        assert "write model.device=cpu" in complaint(capsys, *asked)
    assert "nothing to continue" in complaint(capsys, "generate", "model.path=embedded", "chat=false", "prompt=")
    assert "evaluate.general=nothing.txt" in complaint(
        capsys, "sft", "evaluate.general=nothing.txt", "run.folder=runs/none"
    )
    assert main(["sft", "adapter.rank=5000", f"run.folder={run.parent / 'large'}"]) == 1
    assert "adapter.rank=5000" in capsys.readouterr().err.splitlines()[-1]
