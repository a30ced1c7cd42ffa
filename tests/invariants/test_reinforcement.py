"""What must not change a run of reinforcement learning: batches, slots, poison, answers without a score, kills."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish.data.comparing import collate_comparisons
from burnish.engine.learner import Learner
from burnish.losses import policy
from burnish.sampling import cast, experience
from burnish.sampling.experience import Actor
from burnish.sampling.practice import Practice
from burnish.types import Rollout, RolloutBatch
from tests.letters import METHODS, assert_close, letters_world, lines, reward_adapter, train, trained
from tests.tiny import forkserver

SEVERAL = {"minibatches": 2, "epochs": 2}
"""Several updates a step, for the recipes that know them."""
HERE = Path(__file__)


def several(method: str) -> dict[str, Any]:
    return {} if method == "rloo" else SEVERAL


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = letters_world(tmp_path_factory.mktemp("letters"))
    reward_adapter(folder / "base", folder / "reward")
    return folder


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[list[Rollout]]:
    """What every step of every run in this test writes."""
    found: list[list[Rollout]] = []
    original = Actor.answer

    def answer(actor: Actor, *arguments: Any) -> list[Rollout]:
        found.append(original(actor, *arguments))
        return found[-1]

    monkeypatch.setattr(Actor, "answer", answer)
    return found


# No learning rate

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"model": {"storage": "bf16"}},
    "qlora": {"model": {"storage": "nf4"}},
    "full": {"model": {"storage": "full"}, "kl": {"storage": "fp32"}},
}


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """(trained, what it was) at the positions that count, of each call of a loss in this test."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"policy": [], "value": []}

    def watch(name: str, kind: str) -> None:
        original = getattr(policy, name)

        def loss(now: torch.Tensor, old: torch.Tensor, other: torch.Tensor, weights: torch.Tensor, *more: Any) -> Any:
            counts = weights != 0
            found[kind].append((now.detach()[counts], old[counts]))
            return original(now, old, other, weights, *more)

        monkeypatch.setattr(policy, name, loss)

    for name, kind in (("ppo_loss", "policy"), ("reinforce_loss", "policy"), ("value_loss", "value")):
        watch(name, kind)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_without_a_learning_rate_nothing_moves(
    method: str, kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: Any
) -> None:
    opened: list[tuple[torch.nn.Module, dict[str, torch.Tensor]]] = []

    def open_cast(*arguments: Any, **keywords: Any) -> cast.Cast:
        found = original(*arguments, **keywords)
        opened.append((found.models, {k: v.clone() for k, v in everything(found.models)}))
        return found

    original = cast.open_cast
    monkeypatch.setattr(cast, "open_cast", open_cast)
    run = train(
        method, world, tmp_path / "run", reward={"path": str(world / "reward")}, optim={"lr": 0}, **several(method),
        **KINDS[kind],
    )  # fmt: skip

    ((models, before),) = opened
    roles = {"policy", "reward"} if kind != "full" else {"reward"}
    assert roles | ({"value"} if method == "ppo" else set()) <= {part for name in before for part in name.split(".")}
    for name, tensor in everything(models):
        assert torch.equal(tensor, before[name]), name
    assert losses["policy"]
    assert bool(losses["value"]) == (method == "ppo")
    for now, old in losses["policy"] + losses["value"]:
        assert len(now)
        assert torch.equal(now, old)
    for line in lines(run):
        assert line["kl"] == line["approx_kl"] == line.get("clip_fraction", 0) == 0
        assert line.get("value_clip_fraction", 0) == 0
        assert line["ratio"] == pytest.approx(1, abs=1e-6)  # a mean of ones, in fp32
        assert line["grad_norm"] > 0


def everything(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


# Batches and slots


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {
        "run": {"microbatch_tokens": 12},
        "data": {"max_length": 12},
    }  # as long as the longest answer with its prompt


def all_at_once(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"run": {"microbatch_tokens": 1024, "step_tokens": 1024}}


def prompts_apart(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(
        experience, "collate_comparisons", lambda units, share_prefix: collate_comparisons(units, False)
    )
    return {}


def few_slots(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"rollout": {"slots": 2}}


WAYS: tuple[Callable[[pytest.MonkeyPatch], dict[str, Any]], ...] = (one_by_one, all_at_once, prompts_apart, few_slots)


@pytest.mark.parametrize("method", METHODS)
def test_neither_batches_nor_slots_change_a_run(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[list[Rollout]]
) -> None:
    minibatches = {} if method == "rloo" else {"minibatches": 2}
    shared = {"adapter": {"targets": ("q_proj", "down_proj"), "rank": 2}, **minibatches}
    expected = train(method, world, tmp_path / "expected", **shared)
    wanted = [[(rollout.answer_ids, rollout.ended) for rollout in step] for step in answers]
    assert len({ids for step in wanted for ids, _ in step}) > 12
    sizes = []
    for way in WAYS:
        with monkeypatch.context() as patched:
            answers.clear()
            run = train(method, world, tmp_path / way.__name__, **shared, **way(patched))
        assert [[(rollout.answer_ids, rollout.ended) for rollout in step] for step in answers] == wanted, way.__name__
        assert_close(run, expected)
        sizes.append(lines(run)[0]["tokens"])
    assert lines(expected)[0]["tokens"] < sizes[2]  # prompts were shared, and then were not


# What stands where nothing counts


def poisoned(batch: RolloutBatch, poison: float) -> RolloutBatch:
    idle, aside = batch.weights == 0, (batch.weights == 0) & (batch.value_weights == 0)
    columns = dict.fromkeys(("old_log_probs", "reference_log_probs", "advantages"), idle)
    columns |= dict.fromkeys(("old_values", "returns"), aside)
    return replace(batch, **{name: getattr(batch, name).where(~where, poison) for name, where in columns.items()})


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("ppo", {}),
        ("ppo", {"score_after_end": True}),
        ("grpo", {}),
        ("grpo", {"kl": {"place": "reward", "estimator": "k2"}, "average": "constant"}),
        ("rloo", {}),
        ("reinforce", {}),
    ],
)
def test_what_stands_at_masked_positions_changes_nothing(
    method: str, more: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = train(method, world, tmp_path / "clean", **more)
    step, experienced = Learner.step, Practice.experience

    for poison in (float("nan"), 1e9):

        def poisoned_step(
            learner: Learner, microbatches: Any, objective: Any, count: Any, poison: float = poison
        ) -> dict[str, float]:
            return step(learner, [poisoned(batch, poison) for batch in microbatches], objective, count)

        def poisoned_experience(*arguments: Any, poison: float = poison) -> experience.Minibatches:
            return [[poisoned(batch, poison) for batch in part] for part in experienced(*arguments)]

        monkeypatch.setattr(Learner, "step", poisoned_step)
        monkeypatch.setattr(Practice, "experience", poisoned_experience)
        dirty = train(method, world, tmp_path / str(poison), **more)
        assert lines(dirty) == lines(clean)
        assert all(torch.equal(tensor, trained(clean)[name]) for name, tensor in trained(dirty).items())


# Answers without a score


def brittle(samples: list[dict[str, Any]]) -> list[float]:
    """A reward that fails on some answers."""
    if any(fails(sample["answer"]) for sample in samples):
        raise KeyError("a letter that it does not know")
    return [float(sample["answer"].count("a")) - 0.1 * len(sample["answer"]) for sample in samples]


def fails(answer: str) -> bool:
    return answer[:1] in ("b", "d", "")


def nothing(samples: list[dict[str, Any]]) -> list[None]:
    return [None for _ in samples]


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_without_a_score_is_as_if_it_had_not_been_written(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[list[Rollout]]
) -> None:
    more = {"reward": {"function": f"{HERE}:brittle"}, "rollout": {"prompts": 4, "samples": 6}}
    run = train(method, world, tmp_path / "run", **more)
    failed = [sum(fails(rollout.answer) for rollout in step) for step in answers]
    assert all(0 < count < 24 for count in failed)
    assert [line["failed"] for line in lines(run)] == failed
    answer = Actor.answer
    monkeypatch.setattr(Actor, "answer", lambda *given: [r for r in answer(*given) if not fails(r.answer)])
    without = train(method, world, tmp_path / "without", **more)
    for line, wanted in zip(lines(run), lines(without), strict=True):
        assert wanted["failed"] == 0
        for name in line.keys() - {"failed", "eos_rate", "tokens", "num_tokens"}:
            assert line[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    for name, tensor in trained(without).items():
        torch.testing.assert_close(trained(run)[name], tensor, rtol=1e-2, atol=3e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_earns_no_score_stops_the_run(method: str, world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing scored none of the 12 answers of this step"):
        train(method, world, tmp_path / "run", reward={"function": f"{HERE}:nothing"})


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_which_all_answers_are_cut_stops_the_run(method: str, world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"all answers of step 1 were cut at rollout\.max_tokens=1: write a larger one"
    ):
        train(method, world, tmp_path / "run", rollout={"max_tokens": 1, "prompts": 1, "samples": 2})


# Kills

STEPS = 4
TIMES = ("seconds", "tokens_per_second", "memory_bytes")
KEPT = ("states", "steps_taken", "num_tokens", "eval_loss", "step")
METHOD: dict[str, Any] = {
    "minibatches": 2,
    "run": {"steps": STEPS, "microbatch_tokens": 64, "step_tokens": 64, "device": "cpu"},
    "rollout": {"prompts": 4, "samples": 3, "max_tokens": 6},
    "kl": {"target": 0.5, "horizon": 50},
    "evaluate": {"fraction": 0.2, "prompts": 1, "every": 2, "max_tokens": 4},
    "save": {"every": 2, "keep": 9, "trackers": []},
    "optim": {"lr": 0.004, "schedule": "linear", "warmup": 1},
    "reward": {"function": f"{HERE}:brittle"},
}


def deadly_train(run: Path, world: Path, resume: bool, kill_in: str | None, at_call: int) -> None:
    """A run of PPO in this process; with `kill_in`, ended by SIGKILL at the n-th call of that function."""
    said = os.open(run.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if kill_in is not None:
        module, _, name = kill_in.rpartition(":")
        owner = __import__(module, fromlist=["_"])
        holder, _, last = name.rpartition(".")
        target = getattr(owner, holder) if holder else owner
        function, calls = getattr(target, last), [0]

        def deadly(*arguments: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        setattr(target, last, deadly)
    train("ppo", world, run, **{**METHOD, "save": {**METHOD["save"], "resume": resume}})


def finish(run: Path, world: Path, resume: bool, kill_in: str | None = None, at: int = 0, after: float = 0) -> int:
    process = forkserver().Process(target=deadly_train, args=(run, world, resume, kill_in, at))
    process.start()
    if after:
        process.join(after)
        process.kill()  # nothing happens to one that is done already
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def left(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], dict[str, Any]]:
    """Everything that a run leaves, but for times."""
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    tensors = {f"{file.stem}.{k}": v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}
    state = json.loads((checkpoint / "state.json").read_text())
    documents = {name: json.loads((run / name).read_text()) for name in ("before.json", "after.json", "answers.json")}
    return tensors | trained(run), lines(run), documents | {key: state[key] for key in KEPT}


def assert_same(run: Path, expected: Path) -> None:
    (tensors, logged, said), (wanted, wanted_lines, wanted_said) = left(run), left(expected)
    assert logged == wanted_lines
    assert said == wanted_said
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert finish(run, world, False) == 0
    tensors, logged, said = left(run)
    trained_roles = {"adapters.policy", "adapters.value", "heads.value"}
    assert all(any(role in name for name in tensors) for role in trained_roles)
    assert len({line["beta"] for line in logged if "beta" in line}) == STEPS  # the controller moves
    assert said["states"]["reward"]["failures"] == sum(line.get("failed", 0) for line in logged) > 0
    assert said["states"]["reward"]["asked"] == 12 * STEPS  # evaluations do not count
    return run


@pytest.mark.parametrize(
    ("kill_in", "at"),
    [
        ("burnish.model.decoder:Decoder.decode", 3),  # answering in the verdict before training
        ("burnish.model.decoder:Decoder.decode", 26),  # in a rollout, half an answer written
        ("burnish.sampling.reward_function:FunctionScorer._ask", 22),  # in scoring, some answers scored
        ("burnish.losses.policy:value_loss", 6),  # the policy is updated, the value model not yet
        ("burnish.engine.checkpoints:save_file", 5),  # in the second save, half of its files written
        ("burnish.engine.checkpoints:prune", 1),  # saved, not yet pruned
        ("burnish.model.adapter_files:save_file", 2),  # the policy is written, the value model not
    ],
)
def test_killed_at_a_point_and_continued(
    world: Path, uninterrupted: Path, tmp_path: Path, kill_in: str, at: int
) -> None:
    run = tmp_path / "run"
    assert finish(run, world, False, kill_in, at) == -signal.SIGKILL
    assert finish(run, world, True) == 0
    assert_same(run, uninterrupted)


def test_killed_again_and_again_at_any_moment(world: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run, moments = tmp_path / "run", random.Random(0)
    for _ in range(2):
        finish(run, world, True, after=moments.uniform(0.3, 1.5))
    assert finish(run, world, True) == 0
    assert_same(run, uninterrupted)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ppo"])
def test_the_other_recipes_go_on_from_a_checkpoint(method: str, world: Path, tmp_path: Path) -> None:
    more = {k: v for k, v in METHOD.items() if method != "rloo" or k not in SEVERAL}
    more |= {"model": {"storage": "full"}, "kl": {**METHOD["kl"], "storage": "fp32"}}
    whole = train(method, world, tmp_path / "whole", **more)
    parted = tmp_path / "parted"
    shutil.copytree(whole, parted)
    config = (parted / "config.yaml").read_text()
    (parted / "config.yaml").write_text(config.replace(str(whole), str(parted)))
    shutil.rmtree(parted / f"checkpoints/step-{STEPS:08d}")
    (parted / "after.json").unlink()
    train(method, world, parted, **{**more, "save": {**METHOD["save"], "resume": True}})
    assert_same(parted, whole)
