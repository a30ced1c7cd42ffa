"""Two gloo ranks that share every weight (FSDP2) and deal the prompts answer and learn what one rank does."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.sampling.experience import Actor
from burnish.types import Rollout
from tests.letters import assert_close, letters_world, lines, policy_adapter, reward_adapter, train, trained
from tests.tiny import forkserver

SEVERAL = {"minibatches": 2, "epochs": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # The value model has the reward adapter's shape, which is not the policy's.
    "ppo": ("ppo", {"from": "sft", "reward": {"path": "reward"}, "kl": {"target": 0.5, "horizon": 60}, **SEVERAL}),
    "ppo, full weights": ("ppo", {"model": {"storage": "full"}, "kl": {"storage": "nf4"}, "score_after_end": True}),
    "ppo from sft": ("ppo", {"from": "sft", "value": {"warmup": 1}, **SEVERAL}),
    "grpo": ("grpo", {"model": {"storage": "full"}, "kl": {"storage": "fp32"}, **SEVERAL}),
    "rloo": ("rloo", {"model": {"storage": "nf4"}}),
    "reinforce": ("reinforce", {"reward": {"function": f"{Path(__file__)}:brittle"}, **SEVERAL}),
}


def brittle(samples: list[dict[str, Any]]) -> list[float | None]:
    """A reward that fails on some answers."""
    return [None if sample["answer"][:1] in "bd" else float(len(sample["answer"])) for sample in samples]


def rank_of_a_run(
    method: str, world: Path, folder: Path, more: dict[str, Any], rank: int, ranks: int, port: int
) -> None:
    """One rank of a run, as torchrun would start it; what it writes is kept beside the run."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    answer = Actor.answer

    def noted(actor: Actor, prompts: Any, step: int) -> list[Rollout]:
        found = answer(actor, prompts, step)
        written = [[step, r.group, r.prompt.messages[0].content, r.answer_ids, r.ended] for r in found]
        with folder.with_name(f"{folder.name}.{rank}").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in written)
        return found

    Actor.answer = noted  # type: ignore[method-assign]
    train(method, world, folder, **more)


def run(method: str, world: Path, folder: Path, more: dict[str, Any], ranks: int) -> Path:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = [(method, world, folder, more, rank, ranks, port) for rank in range(ranks)]
    processes = [forkserver().Process(target=rank_of_a_run, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
    return folder


def written(folder: Path, ranks: int) -> list[Any]:
    """The answers of all ranks, ordered by step and prompt; those to one prompt stay in their order."""
    files = [folder.with_name(f"{folder.name}.{rank}") for rank in range(ranks)]
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(found, key=lambda line: line[:2])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = letters_world(tmp_path_factory.mktemp("letters"))
    reward_adapter(folder / "base", folder / "reward")
    policy_adapter(folder / "base", folder / "sft", targets=("q_proj", "down_proj"), rank=4)
    return folder


def settled(world: Path, more: dict[str, Any]) -> dict[str, Any]:
    """The settings with their folders in full, and a number of prompts that two ranks cannot share evenly."""
    found = {"rollout": {"prompts": 5, "samples": 2, "max_tokens": 6}, "save": {"every": 1, "trackers": []}, **more}
    if "from" in more:
        found["from"] = str(world / more["from"])
    if "path" in more.get("reward", {}):
        found["reward"] = {"path": str(world / more["reward"]["path"])}
    return found


@pytest.fixture(scope="module")
def two_ranks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of each kind on two ranks, made once."""
    folder = tmp_path_factory.mktemp("two")

    def made(kind: str) -> Path:
        method, more = KINDS[kind]
        place = folder / kind.replace(",", "").replace(" ", "-")
        return place if place.exists() else run(method, world, place, settled(world, more), 2)

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_do_what_one_does(kind: str, world: Path, tmp_path: Path, two_ranks: Callable[[str], Path]) -> None:
    method, more = KINDS[kind]
    one, two = run(method, world, tmp_path / "one", settled(world, more), 1), two_ranks(kind)
    assert written(two, 2) == written(one, 1)
    assert_close(two, one)
    assert any(name.startswith("value.") for name in trained(two)) == (method == "ppo")
    if kind == "reinforce":
        assert lines(two)[0]["failed"] > 0


def test_two_ranks_go_on_where_they_stopped(world: Path, tmp_path: Path, two_ranks: Callable[[str], Path]) -> None:
    method, more = KINDS["ppo"]
    whole, parted = two_ranks("ppo"), tmp_path / "parted"
    shutil.copytree(whole, parted)
    (parted / "config.yaml").write_text((parted / "config.yaml").read_text().replace(str(whole), str(parted)))
    shutil.rmtree(parted / "checkpoints/step-00000002")
    (parted / "after.json").unlink()
    more = settled(world, more)
    run(method, world, parted, {**more, "save": {**more["save"], "resume": True}}, 2)
    assert lines(parted) == lines(whole)
    assert all(torch.equal(tensor, trained(whole)[name]) for name, tensor in trained(parted).items())
