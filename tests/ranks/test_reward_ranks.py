"""Two gloo ranks that share every weight (FSDP2) train the reward model that one trains, and score as it does."""

import json
import os
import random
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish.engine.mesh import open_mesh, shard
from burnish.engine.rewards import normaliser
from burnish.engine.roles import Role
from burnish.model.adapter_files import load_adapter
from burnish.model.checkpoint import load_model
from burnish.sampling.reward_model import last_values
from tests.tiny import forkserver, tiny_folder

TIMES = ("seconds", "tokens_per_second", "memory_bytes")
METHODS = {"full": ["model.storage=full"], "qlora": ["model.storage=nf4", "adapter.rank=4"]}
SHARES = ((7, 30, 12, 5), (21,))
"""Lengths of what each rank scores: as four batches on one, one on the other."""


def place(rank: int, world: int, port: int) -> None:
    """This process as torchrun would have started it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def train(words: list[str], rank: int, world: int, port: int) -> None:
    place(rank, world, port)
    from burnish.cli import main

    raise SystemExit(main(["reward", *words]))


def finished(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    return [process.exitcode for process in processes]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_folder(folder / "model")
    draw = random.Random(0)
    rows = [
        {
            "prompt": f"say {k}",
            "answers": ["sea " * draw.randrange(1, 9) + str(i) for i in range(3)],
            "ranks": [1, 2, 3],
        }
        for k in range(40)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_what_one_trains(base, tmp_path, method):
    words = [f"model.path={base / 'model'}", f"data.path={base / 'data.jsonl'}", "data.max_length=128"]
    words += ["run.step_tokens=1024", "run.microbatch_tokens=256", "run.steps=3", "run.device=cpu", "optim.lr=0.003"]
    words += ["save.trackers=[]", "save.every=0", "evaluate.every=3", *METHODS[method]]
    context = forkserver()
    for world in (1, 2):
        port, given = free_port(), [*words, f"run.folder={tmp_path / str(world)}"]
        assert (
            finished([context.Process(target=train, args=(given, r, world, port)) for r in range(world)]) == [0] * world
        )
    one, two = curve(tmp_path / "1"), curve(tmp_path / "2")
    assert len(one) == 4
    for ours, expected in zip(two, one, strict=True):
        assert ours == pytest.approx(expected, rel=5e-5, abs=5e-6)
    kind = "model" if method == "full" else "adapter"
    weights = f"{kind}/{'model' if method == 'full' else 'adapter_model'}.safetensors"
    ours, expected = load_file(tmp_path / "2" / weights), load_file(tmp_path / "1" / weights)
    assert ours.keys() == expected.keys()
    assert any(name.endswith("score.weight") for name in ours)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=2e-4)
    scales = [normaliser(tmp_path / world / kind) for world in "12"]
    assert scales[1] == pytest.approx(scales[0], rel=1e-3)
    if method == "qlora":
        scored_on_ranks(base, tmp_path / "1/adapter", tmp_path)


def sequences(rank: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in SHARES[rank]]


def opened(base: Path, adapter: Path) -> Role:
    model = load_model(base / "model", "nf4")
    load_adapter(model, adapter, "reward", head="reward")
    return Role(model, "reward", "reward")


def score(base: Path, adapter: Path, out: Path, rank: int, port: int) -> None:
    """One rank scores its share, with a model that is laid over both."""
    place(rank, 2, port)
    with open_mesh("cpu") as mesh:
        role = opened(base, adapter)
        shard(role.model, role.model.model.layers, mesh)
        out.write_text(json.dumps(last_values(role, sequences(rank), 16, mesh)))


def scored_on_ranks(base: Path, adapter: Path, folder: Path) -> None:
    """Ranks with different numbers of batches wait for each other, and each gets the scores of one process."""
    port, context, outs = free_port(), forkserver(), [folder / f"{rank}.json" for rank in range(2)]
    workers = [context.Process(target=score, args=(base, adapter, outs[rank], rank, port)) for rank in range(2)]
    assert finished(workers) == [0, 0]
    role = opened(base, adapter)
    for rank, out in enumerate(outs):
        assert json.loads(out.read_text()) == pytest.approx(last_values(role, sequences(rank), 4096), abs=1e-5)
