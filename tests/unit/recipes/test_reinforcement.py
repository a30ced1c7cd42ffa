"""A step of PPO, GRPO, RLOO and REINFORCE++ as the recipes take it, recomputed from the answers by definition."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from burnish.config import build
from burnish.data.packing import collate
from burnish.engine.learner import Learner
from burnish.model.adapter_files import load_adapter
from burnish.model.adapters import copy_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.model.heads import add_head
from burnish.sampling.experience import Actor
from burnish.types import Rollout
from burnish.types import Sequence as TokenSequence
from tests.letters import letters_world, lines, policy_adapter, settings, train

HERE = Path(__file__)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = letters_world(tmp_path_factory.mktemp("letters"))
    policy_adapter(folder / "base", folder / "sft")
    return folder


class Update(NamedTuple):
    """One optimizer step of a run."""

    before: dict[str, Tensor]
    """The parameters that it was made at."""
    groups: set[int]
    """Which prompts' answers it was made of."""
    metrics: dict[str, float]


class Witness:
    """What the runs of a test write, and the updates that they make of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[list[Rollout]] = []
        self.updates: list[Update] = []
        answer, step = Actor.answer, Learner.step

        def watched_answer(actor: Actor, *arguments: Any) -> list[Rollout]:
            self.answers.append(answer(actor, *arguments))
            return self.answers[-1]

        def watched_step(learner: Learner, microbatches: Sequence[Any], *more: Any, **named: Any) -> dict[str, float]:
            before = {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}
            groups = {int(group) for batch in microbatches for group in batch.groups}
            self.updates.append(Update(before, groups, step(learner, microbatches, *more, **named)))
            return self.updates[-1].metrics

        monkeypatch.setattr(Actor, "answer", watched_answer)
        monkeypatch.setattr(Learner, "step", watched_step)


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    return Witness(monkeypatch)


# What a run should compute, one answer at a time, in float64


def length_score(samples: list[dict[str, Any]]) -> list[float]:
    return [worth(sample["answer"]) for sample in samples]


def worth(answer: str) -> float:
    letters = answer.split()
    return 0.7 * letters.count("a") - 0.4 * letters.count("c") + 0.2 * len(letters)


def model_of(world: Path, parameters: dict[str, Tensor] | None = None) -> Decoder:
    """The roles of a run that starts from `sft`, with these parameters."""
    model = load_model(world / "base", "bf16").eval()
    load_adapter(model, world / "sft", "reference")
    copy_adapter(model, "reference", "policy")
    copy_adapter(model, "reference", "value")
    add_head(model, "value", model.config.hidden_size)
    own = dict(model.named_parameters())
    for name, tensor in (parameters or {}).items():
        own[name].data.copy_(tensor)
    return model


def read(model: Decoder, rollout: Rollout, adapter: str, temperature: float) -> Tensor:
    """The log-prob of each token of the answer."""
    ids, first = (*rollout.prompt_ids, *rollout.answer_ids), len(rollout.prompt_ids)
    batch = collate([TokenSequence(ids, (0.0,) * len(ids), 0)])
    with torch.no_grad():
        logits = model.logits(batch, adapter).double() / temperature
    return logits.log_softmax(-1)[torch.arange(first - 1, len(ids) - 1), torch.tensor(rollout.answer_ids)]


def read_values(model: Decoder, rollout: Rollout) -> Tensor:
    """The value before each token of the answer, and after the last."""
    ids, first = (*rollout.prompt_ids, *rollout.answer_ids), len(rollout.prompt_ids)
    with torch.no_grad():
        hidden = model.hidden(collate([TokenSequence(ids, (0.0,) * len(ids), 0)]), "value").double()
        weight, bias = (parameter.double() for parameter in model.heads["value"].parameters())
        return (hidden @ weight[0] + bias)[first - 1 :]


class Known(NamedTuple):
    """What is known of an answer before a step's updates."""

    rollout: Rollout
    old: Tensor
    reference: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor


def known_of(model: Decoder, rollout: Rollout, config: Any) -> Known:
    """Advantages and returns by their definition: A_t = Σ_l (γλ)^l δ_t+l; where there are no values, they are 0."""
    gamma, lam = config.gamma, getattr(config, "lam", 1.0)
    old, reference = (read(model, rollout, adapter, config.rollout.temperature) for adapter in ("policy", "reference"))
    ppo = hasattr(config, "value")
    after = ppo and config.score_after_end and rollout.ended
    values = read_values(model, rollout)[: len(old) + after]
    values = values if ppo else torch.zeros_like(values)
    late = 0 if rollout.ended or config.reward.missing_eos == "none" else config.reward.missing_eos_value
    rewards = torch.cat([-config.kl.beta * (old - reference), torch.zeros(int(after), dtype=torch.float64)])
    rewards[-1] += worth(rollout.answer) - late
    following = torch.cat([values[1:], torch.zeros(1, dtype=torch.float64)])
    deltas = rewards + gamma * following - values
    count = len(deltas)
    advantages = torch.stack([sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, count)) for t in range(count)])
    return Known(rollout, old, reference, advantages[: len(old)], values, advantages + values)


def whitened(answers: list[Known]) -> list[Known]:
    every = torch.cat([answer.advantages for answer in answers])
    scale = (every.var(unbiased=False) + 1e-8).sqrt()
    return [answer._replace(advantages=(answer.advantages - every.mean()) / scale) for answer in answers]


def policy_loss(now: Tensor, answer: Known, clip: float) -> Tensor:
    """Of each token."""
    ratio = (now - answer.old).exp()
    return -torch.minimum(ratio * answer.advantages, ratio.clamp(1 - clip, 1 + clip) * answer.advantages)


def value_loss(now: Tensor, answer: Known, clip: float) -> Tensor:
    near = torch.minimum(torch.maximum(now, answer.values - clip), answer.values + clip)
    return 0.5 * torch.maximum((now - answer.returns) ** 2, (near - answer.returns) ** 2)


def setup(method: str, world: Path, run: Path, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config of a run of two steps, and the settings that `train` takes for it."""
    given = {"from": str(world / "sft"), "reward": {"function": f"{HERE}:length_score"}, **more}
    return build(importlib.import_module(f"burnish.recipes.{method}").Config, settings(world, run, given)), given


def close(found: Sequence[float], expected: Sequence[float]) -> bool:
    return list(found) == pytest.approx(list(expected), rel=1e-4, abs=2e-6)


SEVERAL = {"clip": 0.1, "epochs": 2, "minibatches": 2}


PPO: dict[str, dict[str, Any]] = {
    "as it is": {},
    "discounted, at a temperature": {"gamma": 0.9, "lam": 0.6, "rollout": {"temperature": 0.7}},
    "a score after the end": {"score_after_end": True, "rollout": {"temperature": 1.3}},
}


@pytest.mark.parametrize("kind", PPO)
def test_a_step_of_ppo_is_what_it_is_by_definition(kind: str, world: Path, tmp_path: Path, witness: Witness) -> None:
    more = {"kl": {"beta": 0.2}, "value": {"lr": 0.02, "clip": 0.1}, **SEVERAL, **PPO[kind]}
    config, given = setup("ppo", world, tmp_path / "run", more)
    run = train("ppo", world, tmp_path / "run", **given)
    updates = witness.updates[8:]  # those of the second step: the policy has left the reference
    start = model_of(world, updates[0].before | updates[1].before)
    known = whitened([known_of(start, rollout, config) for rollout in witness.answers[1]])
    assert {len(answer.values) - len(answer.old) for answer in known} == ({0, 1} if config.score_after_end else {0})

    temperature, policy_losses, value_losses = config.rollout.temperature, [], []
    for number, update in enumerate(updates):
        model, parts = model_of(world, update.before), []
        for answer in (answer for answer in known if answer.rollout.group in update.groups):
            if number % 2 == 0:
                parts.append(policy_loss(read(model, answer.rollout, "policy", temperature), answer, 0.1))
            else:
                parts.append(value_loss(read_values(model, answer.rollout)[: len(answer.values)], answer, 0.1))
        (value_losses if number % 2 else policy_losses).append(float(torch.cat(parts).mean()))

    assert close([update.metrics["loss"] for update in updates[::2]], policy_losses)
    assert close([update.metrics["loss"] for update in updates[1::2]], value_losses)
    line = lines(run)[1]
    assert close([line["loss"], line["value_loss"]], [sum(policy_losses) / 4, sum(value_losses) / 4])
    assert line["clip_fraction"] > 0
    assert line["value_clip_fraction"] > 0
    divergence = torch.stack([(answer.old - answer.reference).sum() for answer in known])
    assert close([line["kl"]], [float(divergence.mean())])
    assert line["entropy"] == pytest.approx(-float(torch.cat([answer.old for answer in known]).mean()), rel=1e-4)
    returns, values = (torch.cat([getattr(a, n)[: len(a.old)] for a in known]) for n in ("returns", "values"))
    explained = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    assert close([line["explained_variance"]], [float(explained)])


def test_a_step_of_reinforce_is_what_it_is_by_definition(world: Path, tmp_path: Path, witness: Witness) -> None:
    config, given = setup(
        "reinforce", world, tmp_path / "run", {**SEVERAL, "kl": {"beta": 0.2}, "gamma": 0.8, "optim": {"lr": 0.004}}
    )
    train("reinforce", world, tmp_path / "run", **given)
    updates = witness.updates[4:]
    known = whitened([known_of(model_of(world, updates[0].before), r, config) for r in witness.answers[1]])
    expected = []
    for update in updates:
        model, members = model_of(world, update.before), [a for a in known if a.rollout.group in update.groups]
        losses = [policy_loss(read(model, answer.rollout, "policy", 1.0), answer, 0.1) for answer in members]
        expected.append(float(torch.cat(losses).mean()))
    assert close([update.metrics["loss"] for update in updates], expected)


def by_group(answers: list[Known], worths: Sequence[float], loo: bool, scale: bool = False) -> list[Known]:
    """Each answer's advantage at all its tokens."""
    found = []
    for answer, own in zip(answers, worths, strict=True):
        same = [w for a, w in zip(answers, worths, strict=True) if a.rollout.group == answer.rollout.group]
        mean = sum(same) / len(same)
        if loo:
            advantage = own - (sum(same) - own) / (len(same) - 1)
        else:
            deviation = (sum((w - mean) ** 2 for w in same) / (len(same) - 1)) ** 0.5
            advantage = (own - mean) / (deviation + 1e-4 if scale else 1)
        found.append(answer._replace(advantages=torch.full_like(answer.old, advantage)))
    return found


def answers_of(world: Path, witness: Witness, update: Update) -> list[Known]:
    model, nothing = model_of(world, update.before), torch.zeros(0)
    return [
        Known(r, read(model, r, "policy", 1.0), read(model, r, "reference", 1.0), nothing, nothing, nothing)
        for r in witness.answers[1]
    ]


def test_a_step_of_rloo_is_what_it_is_by_definition(world: Path, tmp_path: Path, witness: Witness) -> None:
    _, given = setup("rloo", world, tmp_path / "run", {"kl": {"beta": 0.2}})
    run = train("rloo", world, tmp_path / "run", **given)
    known = answers_of(world, witness, witness.updates[1])
    worths = [worth(a.rollout.answer) - 0.2 * float((a.old - a.reference).sum()) for a in known]
    known = by_group(known, worths, loo=True)
    expected = -torch.stack([(answer.advantages * answer.old).sum() for answer in known]).mean()
    assert close([witness.updates[1].metrics["loss"]], [float(expected)])
    assert [line["ratio"] for line in lines(run)] == pytest.approx([1, 1], abs=1e-6)


GRPO: dict[str, dict[str, Any]] = {
    "as it is": {"kl": {"beta": 0.2}},
    "Dr. GRPO": {"scale": False, "average": "constant", "kl": {"beta": 0.2, "estimator": "k1"}},
    "by token, divergence in the reward": {"average": "token", "kl": {"beta": 0.2, "place": "reward"}},
}


@pytest.mark.parametrize("kind", GRPO)
def test_a_step_of_grpo_is_what_it_is_by_definition(kind: str, world: Path, tmp_path: Path, witness: Witness) -> None:
    config, given = setup("grpo", world, tmp_path / "run", {**SEVERAL, **GRPO[kind]})
    run = train("grpo", world, tmp_path / "run", **given)
    updates, estimator = (
        witness.updates[4:],
        {"k1": lambda d: d, "k3": lambda d: (-d).exp() - 1 + d}[config.kl.estimator],
    )
    known, in_loss = answers_of(world, witness, updates[0]), config.kl.place == "loss"
    costs = [0.2 * float(estimator(a.old - a.reference).sum()) * (not in_loss) for a in known]
    worths = [worth(a.rollout.answer) - cost for a, cost in zip(known, costs, strict=True)]
    known, expected = by_group(known, worths, loo=False, scale=config.scale), []
    for update in updates:
        model, losses = model_of(world, update.before), []
        for answer in (answer for answer in known if answer.rollout.group in update.groups):
            now = read(model, answer.rollout, "policy", 1.0)
            divergence = (now - answer.old).exp() * estimator(now - answer.reference)
            losses.append(policy_loss(now, answer, 0.1) + 0.2 * divergence * in_loss)
        average = {
            "sequence": lambda parts: torch.stack([part.mean() for part in parts]).mean(),
            "token": lambda parts: torch.cat(parts).mean(),
            "constant": lambda parts: torch.cat(parts).sum() / (len(parts) * 6),
        }[config.average]
        expected.append(float(average(losses)))
    assert close([update.metrics["loss"] for update in updates], expected)
    assert witness.updates[0].metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert lines(run)[1]["clip_fraction"] > 0
