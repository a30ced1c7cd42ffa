"""`burnish ppo`: its profiles, where its four models come from, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish.cli import main
from burnish.config import build, parse, to_yaml
from burnish.data.packing import collate
from burnish.model.adapter_config import read_about
from burnish.model.adapter_files import load_adapter
from burnish.model.checkpoint import load_model
from burnish.recipes.ppo import Config
from burnish.sampling import cast
from burnish.sampling.experience import Actor
from burnish.types import Rollout
from burnish.types import Sequence as TokenSequence
from tests.letters import letters_world, lines, policy_adapter, reward_adapter, train, trained

HERE = Path(__file__)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = letters_world(tmp_path_factory.mktemp("letters"))
    policy_adapter(folder / "base", folder / "sft", targets=("q_proj", "up_proj"))
    reward_adapter(folder / "base", folder / "reward")
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[cast.Cast]:
    """The roles of each run in this test."""
    found: list[cast.Cast] = []
    original = cast.open_cast

    def open_cast(*arguments: Any, **keywords: Any) -> cast.Cast:
        found.append(original(*arguments, **keywords))
        return found[-1]

    monkeypatch.setattr(cast, "open_cast", open_cast)
    return found


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    """What the runs of this test write."""
    found: list[Rollout] = []
    original = Actor.answer

    def answer(actor: Actor, *arguments: Any) -> list[Rollout]:
        written = original(actor, *arguments)
        found.extend(written)
        return written

    monkeypatch.setattr(Actor, "answer", answer)
    return found


# Profiles


def test_the_profile_of_the_summarising_paper_is_its_card() -> None:
    config = build(Config, {"profile": "summarize", "reward": {"function": "reward.py:score"}})
    assert (config.rollout.prompts, config.minibatches, config.epochs) == (512, 1, 4)
    optim = config.optim
    assert (optim.lr, optim.eps, optim.beta1, optim.beta2) == (3e-6, 1e-5, 0.9, 0.999)
    assert (optim.schedule, optim.warmup, optim.weight_decay, optim.clip) == ("linear", 0, 0, 0)
    assert (config.kl.beta, config.kl.estimator, config.kl.target) == (0.05, "k1", None)
    assert (config.gamma, config.lam, config.clip, config.value.clip) == (1, 0.95, 0.2, 0.2)
    assert (config.rollout.temperature, config.rollout.max_tokens) == (0.7, 53)
    assert (config.reward.missing_eos, config.reward.missing_eos_value) == ("replace", 1)  # score := -1
    assert config.score_after_end
    assert parse(Config, ["profile=summarize", "reward.function=reward.py:score"]) == config


def test_what_is_given_goes_over_the_profile(tmp_path: Path) -> None:
    words = ["profile=summarize", "optim.lr=1e-4", "epochs=2", "reward.missing_eos=mask", "reward.url=http://here"]
    config = parse(Config, words)
    assert (config.optim.lr, config.optim.eps, config.epochs, config.reward.missing_eos) == (1e-4, 1e-5, 2, "mask")
    assert config.rollout.temperature == 0.7
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert parse(Config, [str(tmp_path / "written.yaml")]) == config


def test_without_a_profile_the_defaults_are_todays() -> None:
    config = parse(Config, ["reward.url=http://here", "model.storage=full"])
    assert (config.profile, config.epochs, config.minibatches, config.optim.lr) == ("instruct", 1, 4, 1e-6)
    assert (config.rollout.temperature, config.reward.missing_eos, config.score_after_end) == (1, "subtract", False)
    assert parse(Config, ["reward.url=http://here"]).optim.lr == 1e-5


# The value model


def test_it_starts_where_the_reward_model_is_and_says_the_normalised_reward(
    world: Path, tmp_path: Path, opened: list[cast.Cast], answers: list[Rollout]
) -> None:
    train("ppo", world, tmp_path / "run", reward={"path": str(world / "reward")}, optim={"lr": 0}, run={"steps": 1})
    (roles,) = opened
    assert roles.value is not None
    scores = roles.reward.measure(answers)
    penalties = [0 if answer.ended else 1 for answer in answers]
    for answer, score, penalty in zip(answers, scores, penalties, strict=True):
        assert last_value(roles, answer) == pytest.approx((score or 0) + penalty, abs=1e-5)
    assert len({round(score or 0, 4) for score in scores}) > 6


def last_value(roles: cast.Cast, answer: Rollout) -> float:
    assert roles.value is not None
    ids = (*answer.prompt_ids, *answer.answer_ids)
    with torch.no_grad():
        return float(roles.value.values(collate([TokenSequence(ids, (0.0,) * len(ids), 0)]))[-1])


@pytest.mark.parametrize("start", ["sft", "base"])
def test_it_starts_at_0_where_the_policy_is_when_there_is_no_reward_adapter(
    world: Path, tmp_path: Path, opened: list[cast.Cast], start: str
) -> None:
    more: dict[str, Any] = {"from": str(world / "sft")} if start == "sft" else {}
    train("ppo", world, tmp_path / "run", optim={"lr": 0}, run={"steps": 1}, **more)
    (roles,) = opened
    parameters = dict(roles.models.named_parameters())
    mine = {name: tensor for name, tensor in parameters.items() if ".adapters.value." in name}
    assert mine
    for name, tensor in mine.items():
        assert tensor.requires_grad
        if start == "sft":
            assert torch.equal(tensor, parameters[name.replace(".value.", ".reference.")])
    assert all(not tensor.any() for name, tensor in parameters.items() if "heads.value" in name)


@pytest.mark.parametrize("kind", [{}, {"model": {"storage": "full"}, "kl": {"storage": "nf4"}}])
def test_it_is_saved_with_its_head_and_loads_again(
    kind: dict[str, Any], world: Path, tmp_path: Path, opened: list[cast.Cast], answers: list[Rollout]
) -> None:
    run = train("ppo", world, tmp_path / "run", reward={"path": str(world / "reward")}, **kind)
    (roles,) = opened
    model = load_model(world / "base", "nf4" if kind else "bf16").eval()
    load_adapter(model, run / "value", "mine", head="mine")
    for answer in answers[:5]:
        ids = (*answer.prompt_ids, *answer.answer_ids)
        batch = collate([TokenSequence(ids, (0.0,) * len(ids), 0)])
        with torch.no_grad():
            assert float(model.values(batch, "mine", "mine")[-1]) == pytest.approx(last_value(roles, answer), abs=1e-6)
    assert read_about(run / "value")["kind"] == "value"
    moved, before = (
        load_file(run / "value/adapter_model.safetensors"),
        load_file(world / "reward/adapter_model.safetensors"),
    )
    assert moved.keys() >= before.keys()
    assert all(not torch.equal(moved[name], tensor) for name, tensor in before.items() if "score" not in name)
    for path in (run / "value", run):
        with pytest.raises(ValueError, match=r"value model|writes text|language model"):
            cast.shared_reward(build(Config, {"reward": {"path": str(path)}}).reward, world / "base")


def test_a_learning_rate_of_its_own_and_of_zero(world: Path, tmp_path: Path) -> None:
    runs = {lr: train("ppo", world, tmp_path / str(lr), value={"lr": lr}, run={"steps": 3}) for lr in (0, 0.003)}
    for lr, run in runs.items():
        assert {line["value_learning_rate"] for line in lines(run)} == {lr}
        assert {line["learning_rate"] for line in lines(run)} == {0.01}
    assert not any(tensor.any() for name, tensor in trained(runs[0]).items() if "score" in name)
    assert any(tensor.any() for name, tensor in trained(runs[0.003]).items() if "score" in name)


def test_it_warms_up_alone(world: Path, tmp_path: Path, opened: list[cast.Cast]) -> None:
    more = {"value": {"warmup": 2}, "optim": {"schedule": "linear", "lr": 0.01}, "save": {"every": 2}, "minibatches": 1}
    run = train("ppo", world, tmp_path / "run", run={"steps": 4}, **more)
    alone, both = lines(run)[:2], lines(run)[2:]
    assert all("learning_rate" not in line and line["loss"] == line["value_loss"] for line in alone)
    assert [line["kl"] for line in lines(run)[:3]] == [0, 0, 0]  # what answers the third step has not moved
    assert lines(run)[3]["kl"] != 0
    assert [line["learning_rate"] for line in both] == pytest.approx([0.01, 0.005])
    assert [line["value_learning_rate"] for line in lines(run)] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert all(line["tokens"] > 0 for line in lines(run))
    checkpoint = load_file(run / "checkpoints/step-00000002/weights.safetensors")
    assert not any(tensor.any() for name, tensor in checkpoint.items() if name.endswith("policy.B"))


def test_a_warm_up_that_takes_all_steps_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"value\.warmup=2 takes all 2 steps"):
        train("ppo", world, tmp_path / "run", value={"warmup": 2}, run={"steps": 2})


# The reference


def test_from_an_adapter_the_reference_is_that_adapter(world: Path, tmp_path: Path, answers: list[Rollout]) -> None:
    shared = {"from": str(world / "sft"), "optim": {"lr": 0}, "run": {"steps": 1}, "rollout": {"temperature": 0.8}}
    run = train("ppo", world, tmp_path / "run", **shared)
    (line,) = lines(run)
    assert line["kl"] == 0
    ours, bare = (log_probs(world, answers, adapter, 0.8) for adapter in (world / "sft", None))
    tokens = sum(len(answer.answer_ids) for answer in answers)
    assert line["entropy"] == pytest.approx(-sum(ours) / tokens, rel=1e-5)  # the adapter is what answered
    assert abs(sum(ours) - sum(bare)) / len(answers) > 0.1  # measured against the base, it would not be 0
    expected = load_file(world / "sft/adapter_model.safetensors")
    left = load_file(run / "adapter/adapter_model.safetensors")
    assert all(torch.equal(left[name], tensor) for name, tensor in expected.items())


def log_probs(world: Path, answers: list[Rollout], adapter: Path | None, temperature: float) -> list[float]:
    """Of each answer whole, in float64."""
    model, found = load_model(world / "base", "bf16").eval(), []
    if adapter is not None:
        load_adapter(model, adapter, "given")
    for answer in answers:
        ids, first = (*answer.prompt_ids, *answer.answer_ids), len(answer.prompt_ids)
        with torch.no_grad():
            batch = collate([TokenSequence(ids, (0.0,) * len(ids), 0)])
            logits = model.logits(batch, "given" if adapter else None).double() / temperature
        picked = logits.log_softmax(-1)[range(first - 1, len(ids) - 1), list(answer.answer_ids)]
        found.append(float(picked.sum()))
    return found


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
def test_full_weights_are_held_near_a_frozen_copy(
    storage: str, world: Path, tmp_path: Path, opened: list[cast.Cast], answers: list[Rollout]
) -> None:
    more = {"model": {"storage": "full"}, "kl": {"storage": storage}, "run": {"steps": 1}}
    run = train("ppo", world, tmp_path / "run", **more)
    (roles,) = opened
    assert roles.reference.model is not roles.policy.model
    assert roles.value is not None
    assert roles.value.model is roles.reference.model
    kept = load_model(world / "base", storage).eval()
    policy = load_model(world / "base", "fp32").eval()
    gaps = []
    for answer in answers:
        ids = (*answer.prompt_ids, *answer.answer_ids)
        weights = (0.0,) * len(answer.prompt_ids) + (1.0,) * len(answer.answer_ids)
        batch = collate([TokenSequence(ids, weights, 0)])
        with torch.no_grad():
            gaps.append(float((policy.log_probs(batch).double() - kept.log_probs(batch).double()).sum()))
    (line,) = lines(run)
    assert line["kl"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-3, abs=1e-6)
    assert (line["kl"] == 0) == (storage == "fp32")
    for name, tensor in kept.named_parameters():
        assert torch.equal(dict(roles.reference.model.named_parameters())[name], tensor)
    left = load_file(run / "model/model.safetensors")
    assert any(not torch.equal(left[name], tensor) for name, tensor in policy.named_parameters() if name in left)


def test_random_weights_are_their_own_reference(world: Path, tmp_path: Path, opened: list[cast.Cast]) -> None:
    for kind in ({"model": {"storage": "full", "init": "random"}}, {"model": {"storage": "nf4", "init": "random"}}):
        run = tmp_path / kind["model"]["storage"]
        train("ppo", world, run, run={"steps": 1}, kl={"storage": "fp32"}, **kind)
        assert lines(run)[0]["kl"] == 0
        assert read_about(run / "value")["base_fingerprint"] is None


# Answers that do not end

MISSING: dict[str, Any] = {
    "none": lambda score: score,
    "replace": lambda score: -0.75,
    "subtract": lambda score: score - 0.75,
    "mask": lambda score: None,
}


def letters(samples: list[dict[str, Any]]) -> list[float]:
    return [float(len(sample["answer"].split())) for sample in samples]


@pytest.mark.parametrize("rule", MISSING)
def test_the_rule_for_answers_without_an_end(rule: str, world: Path, tmp_path: Path, answers: list[Rollout]) -> None:
    reward = {"function": f"{HERE}:letters", "missing_eos": rule, "missing_eos_value": 0.75}
    run = train("ppo", world, tmp_path / "run", reward=reward, run={"steps": 1})
    raw = [float(len(answer.answer.split())) for answer in answers]
    scores = [s if a.ended else MISSING[rule](s) for s, a in zip(raw, answers, strict=True)]
    known = [score for score in scores if score is not None]
    (line,) = lines(run)
    assert 0 < sum(answer.ended for answer in answers) < len(answers)
    assert line["reward"] == pytest.approx(sum(known) / len(known))
    assert line["eos_rate"] == sum(answer.ended for answer in answers) / 12
    assert line["failed"] == 0
    shown = json.loads((run / "answers.json").read_text())
    assert [sample["score"] for sample in shown] == pytest.approx(scores[:8])


# From the command line


def test_the_whole_way(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fine-tuning, a reward model and PPO, each from what the one before left."""
    rows = [{"prompt": f"{a} {b}", "completion": f"{b} {a}"} for a in "abcdefghi" for b in "abc"]
    pairs = [{"prompt": a, "chosen": f"{a} a", "rejected": f"{b} c"} for a in "abcdefghi" for b in "bde"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    small = ["run.device=cpu", "save.trackers=[]", "data.max_length=24", "run.microbatch_tokens=64"]
    small += ["run.step_tokens=128", "run.steps=2", "optim.lr=0.005", "evaluate.fraction=0"]
    model, sft, reward = f"model.path={world / 'base'}", tmp_path / "sft", tmp_path / "reward"
    adapter = ["adapter.kind=lora", "adapter.rank=2", "model.storage=nf4"]
    assert main(["sft", *small, model, *adapter, f"data.path={tmp_path / 'rows.jsonl'}", f"run.folder={sft}"]) == 0
    pairs_path = f"data.path={tmp_path / 'pairs.jsonl'}"
    assert main(["reward", *small, f"from={sft}", pairs_path, f"run.folder={reward}"]) == 0
    ppo = ["ppo", *small, f"from={sft}", f"reward.path={reward}", f"data.path={world / 'prompts.jsonl'}"]
    ppo += ["rollout.prompts=4", "rollout.samples=4", "rollout.max_tokens=6"]
    assert main([*ppo, f"run.folder={tmp_path / 'ppo'}"]) == 0
    assert "QLoRA + PPO" in capsys.readouterr().out
    assert lines(tmp_path / "ppo")[0]["kl"] == 0
    about = read_about(tmp_path / "ppo/adapter")
    assert about["storage"] == "nf4"
