"""`burnish dpo`, run as a user runs it, and its parts against what they are by definition."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish.cli import main
from burnish.config import ConfigError, build, parse
from burnish.data.comparing import ComparisonStream, collate_comparisons
from burnish.data.comparisons import Comparisons
from burnish.data.preferences import prepare_preferences
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.mesh import Mesh
from burnish.engine.reference import asked
from burnish.engine.roles import Role
from burnish.engine.start import Start
from burnish.evaluate import judge
from burnish.losses import preference
from burnish.losses.preference import Options, Pairs, pairs_of, preference_loss
from burnish.model.checkpoint import load_model
from burnish.recipes.dpo import LOSSES, READ_BY, Config, kto_objective
from burnish.types import Comparison, PreferenceBatch
from burnish.types import Sequence as TokenSequence
from tests.tiny import forkserver, instead, tiny_data, tiny_folder

SPENT = ("seconds", "tokens_per_second", "memory_bytes")
"""What two equal runs may differ in."""
MESH = Mesh(torch.device("cpu"))
PAIRS, LABELS = "pairs.jsonl", "labels.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, pairs, and labelled answers."""
    place = tmp_path_factory.mktemp("dpo")
    tiny_folder(place / "model")
    rows = [
        {"prompt": f"say {i} plus {i * i}", "chosen": "ab " * (i % 4) + "yes", "rejected": "no " * (1 + i % 3) + "end"}
        for i in range(16)
    ]
    write(place / PAIRS, rows)
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    write(place / LABELS, labelled)
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(folder: Path, run: Path, *more: str, data: str = PAIRS) -> list[str]:
    """A run whose every step takes all data in one micro-batch."""
    shared = [f"data.path={folder / data}", f"run.folder={run}", "run.steps=4", "run.device=cpu", "save.trackers=[]"]
    shared += ["run.step_tokens=2048", "run.microbatch_tokens=2048", "data.max_length=128", "evaluate.fraction=0.2"]
    started = [] if any(word.startswith("from=") for word in more) else [f"model.path={folder / 'model'}"]
    return ["dpo", *instead([*started, *shared, "optim.lr=0.003"], *more)]


def lines(run: Path) -> list[dict[str, float]]:
    """The metrics, without times and sizes."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPENT} for line in found]


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())[0]


def trained(run: Path) -> dict[str, torch.Tensor]:
    (file,) = [*run.glob("adapter/adapter_model.safetensors"), *run.glob("model/model.safetensors")]
    return load_file(file)


def reference_folder() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"]) / "burnish" / "reference"


def test_a_fresh_adapter_begins_at_log_2_and_learns_the_preferences(folder, tmp_path):
    run = tmp_path / "run"
    assert main(words(folder, run, "run.steps=12", "evaluate.every=6", "evaluate.prompts=2", "beta=0.5")) == 0
    steps = [line for line in lines(run) if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert (steps[0]["accuracy"], steps[0]["margin"], steps[0]["chosen_reward"]) == (0.5, 0, 0)
    assert steps[-1]["loss"] < 0.3
    assert steps[-1]["accuracy"] == 1
    for line in steps:
        assert line["margin"] == pytest.approx(line["chosen_reward"] - line["rejected_reward"], abs=1e-5)
        assert line["grad_norm"] > 0
    row = results(run)
    assert row["method"] == "LoRA + DPO"
    assert row["before"]["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert row["before"]["eval_accuracy"] == 0.5
    assert row["metrics"]["eval_loss"] < 0.5
    assert row["metrics"]["eval_margin"] > 0
    evaluated = [line for line in lines(run) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [6, 12]
    assert evaluated[-1]["eval_loss"] == pytest.approx(row["metrics"]["eval_loss"])


def test_from_an_adapter_that_is_the_reference(folder, tmp_path):
    data = tiny_data(tmp_path / "data.jsonl")
    shared = ["run.device=cpu", "save.trackers=[]", "data.max_length=128", "run.step_tokens=256"]
    sft = ["sft", f"model.path={folder / 'model'}", f"data.path={data}", f"run.folder={tmp_path / 'sft'}", *shared]
    assert main([*sft, "run.steps=3", "optim.lr=0.01", "run.microbatch_tokens=256", "adapter.rank=4"]) == 0
    for more in ("reference=auto", "reference=cached"):
        run = tmp_path / more
        assert main(words(folder, run, f"from={tmp_path / 'sft'}", more)) == 0
        assert lines(run)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert lines(run)[-1]["loss"] < 0.69
    assert lines(tmp_path / "reference=auto") == lines(tmp_path / "reference=cached")
    sft_weights, ours = trained(tmp_path / "sft"), trained(run)
    assert sft_weights.keys() == ours.keys()
    assert any((ours[name] != sft_weights[name]).any() for name in ours)


def prepared(folder: Path, data: str, kind: str = "pairs") -> tuple[Config, Comparisons]:
    config = parse(Config, words(folder, folder / "none", data=data)[1:])
    tokenizer = Tokenizer.load(folder / "model")
    template = ChatTemplate.open("auto", tokenizer)
    return config, prepare_preferences(config.data, config.evaluate, tokenizer, template, 0, 2048, kind=kind).train


def test_full_weights_have_a_reference_that_is_a_second_copy_of_the_model(folder, tmp_path):
    run = tmp_path / "run"
    assert main(words(folder, run, "model.storage=full")) == 0
    config, data = prepared(folder, PAIRS)
    config = parse(Config, words(folder, run, "model.storage=full")[1:])
    model, adapter = open_model(Start(folder / "model"), config.model, config.adapter, config.run, MESH)
    learner = open_learner(model, adapter, config.optim, 4, MESH)
    second = asked(Role(load_model(folder / "model", "fp32"), None), MESH)
    stream = ComparisonStream(data, 2048, 1, seed=0)

    def objective(batch: PreferenceBatch):
        pairs = pairs_of(model.log_probs(batch, adapter), batch.reference_log_probs, batch)
        return preference_loss(pairs, batch.pair_weights, {"sigmoid": 1.0}, Options(beta=0.1))

    for step, line in enumerate(line for line in lines(run) if "loss" in line):
        batches = [second(batch) for batch in stream.step(step)]
        metrics = learner.step(batches, objective, lambda batch: batch.num_pairs)
        for name, value in metrics.items():
            assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, name)
    assert lines(run)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("more", [("loss=sigmoid",), ("loss=kto",), ("loss={ipo: 1, sft: 0.5}", "model.storage=full")])
def test_shared_prompts_change_nothing(folder, tmp_path, more):
    for shares in ("true", "false"):
        assert main(words(folder, tmp_path / shares, *more, f"share_prefix={shares}")) == 0
    shared, apart = lines(tmp_path / "true"), lines(tmp_path / "false")
    assert shared[0]["tokens"] < apart[0]["tokens"]
    for ours, expected in zip(shared, apart, strict=True):
        for name in expected.keys() - {"tokens", "num_tokens"}:
            assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_several_losses_add_up(folder, tmp_path):
    run = tmp_path / "run"
    assert main(words(folder, run, "loss={sigmoid: 1, sft: 0.1}", "run.steps=2")) == 0
    for line in lines(run):
        assert line["loss"] == pytest.approx(line["sigmoid_loss"] + 0.1 * line["sft_loss"], rel=1e-6)
    assert "loss:\n  sigmoid: 1.0\n  sft: 0.1\n" in (run / "config.yaml").read_text()


def test_a_loss_without_a_reference_asks_none(folder, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("the reference was asked")

    monkeypatch.setattr("burnish.engine.reference.asked", refuse)
    monkeypatch.setattr("burnish.engine.reference.remembered", refuse)
    for more in (["loss=simpo", "beta=2"], ["loss={orpo: 1, sft: 1}", "model.storage=full"]):
        assert main(words(folder, tmp_path / more[0][5:10], *more, "run.steps=1")) == 0


@pytest.mark.parametrize("data", [LABELS, PAIRS])
def test_kto_learns_from_labels_and_from_pairs(folder, tmp_path, data):
    run = tmp_path / "run"
    assert main(words(folder, run, "loss=kto", "run.steps=10", "beta=0.5", data=data)) == 0
    steps = lines(run)
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-6)  # λ (1 − σ(0))
    assert steps[0]["kl"] == 0
    assert steps[-1]["loss"] < 0.4
    assert steps[-1]["wanted_reward"] > steps[-1]["unwanted_reward"]
    assert results(run)["method"] == "LoRA + KTO"
    assert results(run)["metrics"]["eval_loss"] < 0.5


def random_units(count: int, labels: bool = False) -> list[Comparison]:
    """Comparisons of random answers to random prompts, one of three answers."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 320, (length,), generator=generator).tolist())

    units: list[Comparison] = []
    for row in range(count):
        prompt, number = draw(3 + row % 5), 3 if row == 2 else 2
        answers = [draw(2 + (3 * row + k) % 9) for k in range(number)]
        sequences = [TokenSequence(prompt + a, (0.0,) * len(prompt) + (1.0,) * len(a), row) for a in answers]
        pairs = tuple((i, j, 0.0) for i in range(number) for j in range(i + 1, number))
        units.append(Comparison(tuple(sequences), () if labels else pairs, (1, 0, -1)[:number] if labels else ()))
    return units


CUTS = {"all": [8], "one each": [1] * 8, "ragged": [1, 5, 2]}


@pytest.mark.parametrize("loss", LOSSES)
def test_how_a_step_is_cut_does_not_change_it(folder, loss):
    curves: list[torch.Tensor] = []
    tree = {"model": {"path": str(folder / "model")}, "adapter": {"rank": 4}, "optim": {"lr": 0.01}}
    smoothing = {"label_smoothing": 0.1} if loss in READ_BY["label_smoothing"] else {}
    config = build(Config, {**tree, "loss": loss, **smoothing})
    options = Options(0.1, 0.1)
    for cut in CUTS.values():
        model, adapter = open_model(Start(folder / "model"), config.model, config.adapter, config.run, MESH)
        learner = open_learner(model, adapter, config.optim, 3, MESH)
        policy, refer = Role(model, adapter), asked(Role(model, None), MESH)

        def objective(batch: PreferenceBatch, policy: Role = policy):
            pairs = pairs_of(policy.log_probs(batch), batch.reference_log_probs, batch)
            return preference_loss(pairs, batch.pair_weights, config.mix, options)

        curve: list[tuple[float, ...]] = []
        for _ in range(3):
            units = iter(random_units(8, labels=loss == "kto"))
            batches = [refer(collate_comparisons([next(units) for _ in range(size)])) for size in cut]
            method = kto_objective(policy, batches, options, MESH, learner.room) if loss == "kto" else objective
            metrics = learner.step(batches, method, lambda b: b.num_labels if loss == "kto" else b.num_pairs)
            curve.append(tuple(value for name, value in sorted(metrics.items()) if name != "tokens"))
        curves.append(torch.tensor(curve))
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=1e-4, atol=1e-5)


def test_swapped_labels_mirror_the_gradient(folder):
    """At the start the policy is the reference, and what raises one answer would raise the other by as much."""
    model = load_model(folder / "model", "full")
    refer = asked(Role(load_model(folder / "model", "fp32"), None), MESH)
    batch = refer(collate_comparisons(random_units(6)))
    swapped = dataclasses.replace(batch, chosen=batch.rejected, rejected=batch.chosen)
    gradients: list[torch.Tensor] = []
    for given in (batch, swapped):
        model.zero_grad()
        pairs = pairs_of(model.log_probs(given), given.reference_log_probs, given)
        loss, _ = preference_loss(pairs, given.pair_weights, {"sigmoid": 1.0}, Options())
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], -gradients[1], rtol=1e-4, atol=1e-6)
    assert gradients[0].norm() > 0.1


@pytest.mark.parametrize(
    "more",
    [("adapter.dropout=0.2", "evaluate.every=2"), ("model.storage=full",), ("loss=kto", "reference=cached")],
    ids=["lora", "full", "kto"],
)
def test_a_run_goes_on_where_it_stopped(folder, tmp_path, more, monkeypatch):
    monkeypatch.setattr(judge, "has_gold", lambda prompts: True)
    monkeypatch.setattr(judge, "gold", lambda answers: [float(sum(answer.answer_ids)) for answer in answers])
    small = ["run.microbatch_tokens=128", "run.step_tokens=256", "save.every=2", "run.steps=4", *more]
    small += ["evaluate.prompts=3", "evaluate.max_tokens=8"]
    for name in ("whole", "parted"):
        assert main(words(folder, tmp_path / name, *small)) == 0
    parted = tmp_path / "parted"
    shutil.rmtree(parted / "checkpoints" / "step-00000004")  # back to step 2
    (parted / "after.json").unlink()
    shutil.rmtree(reference_folder(), ignore_errors=True)  # it is asked again, and is still what training began with
    assert main(words(folder, parted, *small, "save.resume=true")) == 0
    assert lines(parted) == lines(tmp_path / "whole")
    worth, whole = (json.loads((tmp_path / name / "after.json").read_text())["metrics"] for name in ("parted", "whole"))
    assert worth == whole
    assert more != ("model.storage=full",) or whole["eval_win_rate"] != 0.5  # it is told apart from what it was
    ours, expected = (
        load_file(tmp_path / name / "checkpoints" / "step-00000004" / "weights.safetensors")
        for name in ("parted", "whole")
    )
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def one_rank(arguments: list[str], rank: int, world: int, port: int) -> None:
    """One rank of a run, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    raise SystemExit(main(arguments))


@pytest.mark.parametrize(
    "more", [("loss={sigmoid: 1, sft: 0.1}",), ("loss=kto", "model.storage=full")], ids=["lora", "kto-full"]
)
def test_two_ranks_equal_one(folder, tmp_path, more):
    small = ["run.microbatch_tokens=128", "run.step_tokens=512", "run.steps=3", "evaluate.every=3", *more]
    context = forkserver()
    for world in (1, 2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        arguments = words(folder, tmp_path / str(world), *small)
        shutil.rmtree(reference_folder(), ignore_errors=True)
        ranks = [context.Process(target=one_rank, args=(arguments, rank, world, port)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0] * world
    for ours, expected in zip(lines(tmp_path / "2"), lines(tmp_path / "1"), strict=True):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    ours, expected = trained(tmp_path / "2"), trained(tmp_path / "1")
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-3)


def test_the_names_of_losses_are_those_that_there_are():
    assert set(LOSSES) == {*preference.LOSSES, "kto"}


@pytest.mark.parametrize("name", sorted(preference.LOSSES))
@pytest.mark.parametrize(("option", "value"), [("label_smoothing", 0.3), ("margin", 3.0)])
def test_a_setting_that_a_loss_does_not_read_is_refused_with_it(name, option, value):
    pairs = Pairs(*(torch.tensor([number]) for number in (-3.0, -2.0, -3.3, -2.4, 4.0, 5.0)))
    before, after = (
        preference.LOSSES[name](pairs, dataclasses.replace(Options(label_smoothing=0.1), **change))
        for change in ({}, {option: value})
    )
    assert (name in READ_BY[option]) == (not torch.equal(before, after))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("beta=0", "'beta' should be float, not 0 (input should be greater than 0)"),
        ("beta=-0.1", "greater than 0"),
        ("loss=sigmod", "loss=sigmod is not known; did you mean 'sigmoid'?"),
        ("loss={sigmoid: 1, kto: 1}", "write loss=kto alone"),
        ("loss={sigmoid: 1, stf: 1}", "did you mean 'sft'?"),
        ("loss={sigmoid: 1, sigmoid: 2}", "gives 'sigmoid' twice: leave one out"),
        ("loss={sigmoid: 0}", "one is above 0"),
        ("loss={sigmoid: -1, sft: 2}", "not negative"),
        ("loss={sigmoid: 1", "cannot be read"),
        ("loss=", "is not known; known are sigmoid, robust"),
        ("loss=exo", "label_smoothing=0.001"),
        ("label_smoothing=1", "less than 1"),
        ("margin=2", "margin does nothing with loss=sigmoid: slic, simpo read it; leave it out"),
        ("wanted_weight=2", "wanted_weight does nothing with loss=sigmoid: kto read it"),
    ],
)
def test_settings_that_make_no_sense(given, said):
    with pytest.raises(ConfigError) as caught:
        parse(Config, [given])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"label_smoothing below 0\.5"):
        parse(Config, ["loss=robust", "label_smoothing=0.6"])
    with pytest.raises(ConfigError, match="write reference=cached"):
        parse(Config, ["model.storage=full", "reference=on_the_fly"])


def test_the_learning_rate_is_that_of_the_method():
    assert parse(Config, []).optim.lr == 5e-6
    assert parse(Config, ["model.storage=full"]).optim.lr == 5e-7


def test_mistakes_are_answered_in_one_line_before_torch(folder, tmp_path):
    examples = tiny_data(tmp_path / "examples.jsonl")
    ties = write(tmp_path / "ties.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3)
    (tmp_path / "empty").mkdir()
    run = tmp_path / "run"
    mistakes = [
        (["loss=sigmod"], "sigmoid"),
        (["beta=0"], "beta"),
        ([f"data.path={examples}"], "preference"),
        ([f"data.path={ties}"], "identical_answers"),
        ([f"from={tmp_path / 'empty'}"], "neither a model nor an adapter"),
        ([f"from={tmp_path / 'nowhere'}"], "nowhere"),
    ]
    commands = [(instead(words(folder, run), *more), said) for more, said in mistakes]
    script = (
        "import contextlib, io, sys; from burnish.cli import main\n"
        f"for words, said in {commands!r}:\n"
        "    err = io.StringIO()\n"
        "    with contextlib.redirect_stderr(err):\n"
        "        assert main(words) != 0, words\n"
        "    last = err.getvalue().splitlines()[-1]\n"
        "    assert said in last and 'Traceback' not in err.getvalue(), (said, err.getvalue())\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert not run.exists()
