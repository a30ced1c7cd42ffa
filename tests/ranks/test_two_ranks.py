"""Two gloo ranks that share every weight between them (FSDP2) learn what one process learns."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import forkserver, instead, tiny_data, tiny_folder

METHODS = {
    "full": ["model.storage=full"],
    "qlora": ["model.storage=nf4", "adapter.rank=4", "run.memory=least"],
}


def train(words: list[str], rank: int, world: int, port: int) -> None:
    """One rank of a run, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from burnish.cli import main

    raise SystemExit(main(["sft", *words]))


def start(words: list[str], world: int) -> list[multiprocessing.Process]:
    context = forkserver()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [context.Process(target=train, args=(words, rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[multiprocessing.Process]) -> list[int | None]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def run(words: list[str], world: int) -> None:
    assert finish(start(words, world)) == [0] * world


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_folder(folder / "model")
    tiny_data(folder / "data.jsonl")
    return folder


def words(base: Path, folder: Path, *more: str) -> list[str]:
    shared = [f"model.path={base / 'model'}", f"data.path={base / 'data.jsonl'}", f"run.folder={folder}"]
    shared += ["run.step_tokens=512", "run.microbatch_tokens=128", "data.max_length=128", "run.device=cpu"]
    shared += ["optim.lr=0.001", "save.every=2", "evaluate.every=2", "save.trackers=[]"]
    return instead(shared, *more)


def curve(folder: Path) -> list[list[float]]:
    """Every metric that training and evaluation gave, step by step, without times and sizes."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spent = ("seconds", "tokens_per_second", "memory_bytes")
    return [[value for name, value in sorted(line.items()) if name not in spent] for line in lines]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one(base, tmp_path, method):
    for world in (1, 2):
        run(words(base, tmp_path / str(world), "run.steps=4", *METHODS[method]), world)
    one, two = curve(tmp_path / "1"), curve(tmp_path / "2")
    assert len(one) == 6  # four steps, two evaluations
    for ours, expected in zip(two, one, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=2e-5, atol=1e-6)
    kind = "model/model.safetensors" if method.startswith("full") else "adapter/adapter_model.safetensors"
    ours, expected = load_file(tmp_path / "2" / kind), load_file(tmp_path / "1" / kind)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=2e-4)


def test_two_ranks_resume_where_they_stopped(base, tmp_path):
    more = ("run.steps=4", "adapter.dropout=0.3", "adapter.rank=4", "evaluate.prompts=2", "evaluate.max_tokens=3")
    whole, parted = words(base, tmp_path / "whole", *more), words(base, tmp_path / "parted", *more)
    run(whole, 2)
    run(parted, 2)
    for name in ("step-00000004", "metrics.jsonl", "after.json"):  # back to the checkpoint of step 2
        path = tmp_path / "parted" / ("checkpoints/" + name if name.startswith("step") else name)
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        elif path.suffix == ".json":
            path.unlink()
    run([*parted, "save.resume=true"], 2)
    assert curve(tmp_path / "parted") == curve(tmp_path / "whole")


def test_a_signal_to_one_rank_stops_both_and_saves(base, tmp_path):
    folder = tmp_path / "run"
    processes = start(
        words(base, folder, "run.steps=100000", "save.every=0", "evaluate.every=0", "evaluate.fraction=0"), 2
    )
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [130, 130]
    assert len(list((folder / "checkpoints").iterdir())) == 1
