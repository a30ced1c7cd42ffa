"""The command line as a user meets it: what it shows, and what it answers to mistakes, without loading torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.cli import main
from tests.tiny import instead, tiny_tokenizer


@pytest.fixture
def folders(tmp_path):
    """A model folder as far as a preflight looks at it, and a data file."""
    model = tiny_tokenizer(tmp_path / "model")
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "vocab_size": 320}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    (model / "config.json").write_text(json.dumps(config))
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "Say hi.", "output": "hi"}\n' * 4)
    return model, data


def complaint(capsys, *words: str) -> str:
    """What the command says on stderr: one line, with a status that is not 0 and nothing on stdout."""
    assert main(list(words)) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_overview_names_every_recipe_and_tool(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for kind in ("recipes", "tools"):
        for path in (Path(__file__).parents[2] / "burnish" / kind).glob("[a-z]*.py"):
            assert f"  {path.stem} " in shown


@pytest.mark.parametrize("name", ["sft", "data", "generate", "merge", "eval", "doctor", "demo", "report"])
def test_help_shows_every_field_with_its_default(capsys, name):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: burnish {name}" in shown
    if name == "sft":
        assert "  adapter.rank=16\n" in shown
        assert "Rank r of the update B·A." in shown


def test_mistakes_in_names(capsys):
    assert "did you mean 'sft'?" in complaint(capsys, "stf")
    assert "did you mean 'optim.lr'?" in complaint(capsys, "sft", "optim.l=3")
    assert "settings are written as optim.lr=3" in complaint(capsys, "sft", "--lr", "3")
    assert "audit|preview" in complaint(capsys, "data", "data.path=embedded")
    assert "--json is for tools" in complaint(capsys, "sft", "--json")


def test_a_key_of_another_command_names_it(capsys):
    said = complaint(capsys, "sft", "model.shape=tiny")
    assert said.startswith("burnish sft: 'model.shape' is a setting of bench, not of sft: sft has model.path, ")
    assert said.count("model.storage") == 1
    said = complaint(capsys, "sft", "beta=0.1")
    assert said == "burnish sft: 'beta' is a setting of dpo, not of sft: --help lists the keys\n"
    said = complaint(capsys, "sft", "seed=3")
    assert said == (
        "burnish sft: unknown key 'seed'; did you mean 'run.seed'? ('seed' is a setting of data, generate)\n"
    )


def test_folders_that_are_not_there(capsys, tmp_path, monkeypatch):
    def refuse(name: str, **_: object) -> str:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "judge"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    there_is_none = "there is no folder runs/min; did you mean runs/mine?"
    assert complaint(capsys, "generate", "model.adapter=runs/min", "prompt=x") == (
        f"burnish generate: model.adapter: {there_is_none}\n"
    )
    assert complaint(capsys, "dpo", "from=runs/min") == f"burnish dpo: from: {there_is_none}\n"
    assert complaint(capsys, "dpo", "from=runs/nothere") == "burnish dpo: from: there is no folder runs/nothere\n"
    assert complaint(capsys, "eval", "model.path=runs/min") == (
        f"burnish eval: model.path: {there_is_none} (nor did the hub give it: cannot reach the hub)\n"
    )
    assert complaint(capsys, "grpo", "reward.path=runs/jdge") == (
        "burnish grpo: reward.path: there is no folder runs/jdge; did you mean runs/judge? "
        "(nor did the hub give it: cannot reach the hub)\n"
    )
    assert complaint(capsys, "generate", "model.adapter=runs/mine", "prompt=x").startswith(
        "burnish generate: model.adapter=runs/mine holds no adapter_config.json"
    )


def test_mistakes_in_paths(capsys, folders, tmp_path):
    model, data = folders
    run = f"run.folder={tmp_path / 'run'}"
    assert "nowhere" in complaint(capsys, "sft", f"model.path={tmp_path}/nowhere", f"data.path={data}", run)
    assert "nothing.jsonl" in complaint(
        capsys, "sft", f"model.path={model}", f"data.path={tmp_path}/nothing.jsonl", run
    )
    assert "is a file" in complaint(capsys, "sft", f"model.path={model}", f"data.path={data}", f"run.folder={data}/run")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    said = complaint(capsys, "sft", f"model.path={model}", f"data.path={data}", f"run.folder={occupied}")
    assert "is not empty and holds no run" in said
    assert (occupied / "notes.txt").read_text() == "mine"
    (occupied / "config.yaml").write_text("run: {steps: 3}\n")
    (occupied / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "save.resume=true" in complaint(capsys, "sft", f"model.path={model}", f"run.folder={occupied}")


def test_a_run_is_not_resumed_with_other_settings(capsys, folders, tmp_path):
    from burnish.config import parse, to_yaml
    from burnish.recipes.sft import Config

    model, data = folders
    words = [f"model.path={model}", f"data.path={data}", f"run.folder={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(parse(Config, [*words, "optim.lr=0.5"])))
    assert "(optim.lr)" in complaint(capsys, "sft", *words, "save.resume=true")


def test_unknown_architecture_lists_the_known(capsys, folders, tmp_path):
    model, data = folders
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["WhoKnowsForCausalLM"]}))
    said = complaint(capsys, "sft", f"model.path={model}", f"data.path={data}", f"run.folder={tmp_path / 'run'}")
    assert "WhoKnowsForCausalLM" in said
    assert "LlamaForCausalLM" in said


def test_data_mistakes_name_file_and_line(capsys, folders, tmp_path):
    model, data = folders
    words = [f"model.path={model}", f"data.path={data}", f"run.folder={tmp_path / 'run'}"]
    data.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    assert f"{data}:2" in complaint(capsys, "sft", *words)
    data.write_text('{"apples": 1}\n')
    assert "apples" in complaint(capsys, "sft", *words)


def test_cuda_without_a_device(capsys, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("burnish.engine.preflight.cuda_device_count", lambda: 0)
    model, data = folders
    words = [f"model.path={model}", f"data.path={data}", f"run.folder={tmp_path / 'run'}"]
    assert "run.device=cpu" in complaint(capsys, "sft", *words, "run.device=cuda")


def test_every_answer_to_a_mistake_comes_before_torch(folders, tmp_path):
    model, data = folders
    good = [f"model.path={model}", f"data.path={data}", f"run.folder={tmp_path / 'run'}"]
    commands = [
        [],
        ["sft", "--help"],
        ["sft", "optim.lrr=3"],
        ["sft", "model.shape=tiny"],
        ["sft", "optim.lr=x"],
        ["sft", *instead(good, "model.path=/nowhere")],
        ["sft", *instead(good, "data.path=/nowhere.jsonl")],
        ["sft", *instead(good, f"run.folder={data}")],
        ["sft", *good, "data.format=nonsense"],
        ["sft", *good, *good],
        ["generate", "prompt=hi", "model.path=/nowhere"],
        ["eval", "model.path=/nowhere"],
        ["merge", "out=x", "model.adapter=/nowhere"],
    ]
    script = (
        "import sys; from burnish.cli import main\n"
        f"for words in {commands!r}:\n"
        "    main(words)\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [[], ["sft", "--help"]])
def test_help_ends_quietly_where_nobody_reads_on(words):
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-m", "burnish", *words], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")
