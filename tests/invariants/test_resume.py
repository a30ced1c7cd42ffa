"""A run killed anywhere and continued equals the uninterrupted run, bit for bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import forkserver, instead, tiny_data, tiny_folder

STEPS = 9
TIMES = ("seconds", "tokens_per_second", "memory_bytes")
"""What two equal runs may differ in."""


def train(words: list[str], kill_in: str | None = None, at_call: int = 0) -> None:
    """Run `burnish sft` in this process; with `kill_in`, end it by SIGKILL at the n-th call of that function."""
    torch.set_num_threads(1)
    run = Path(next(word for word in words if word.startswith("run.folder=")).removeprefix("run.folder="))
    said = os.open(run.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if kill_in is not None:
        module, _, name = kill_in.rpartition(":")
        owner = __import__(module, fromlist=["_"])
        holder, _, last = name.rpartition(".")
        target = getattr(owner, holder) if holder else owner
        original, calls = getattr(target, last), [0]

        def deadly(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(target, last, deadly)
    from burnish.cli import main

    raise SystemExit(main(["sft", *words]))


@pytest.fixture(scope="module")
def processes():
    """A server that has loaded torch once and forks a clean process for each run."""
    return forkserver()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny_folder(folder / "model")
    tiny_data(folder / "data.jsonl")
    return folder


def words(base: Path, run: Path, *more: str) -> list[str]:
    shared = [f"model.path={base / 'model'}", f"data.path={base / 'data.jsonl'}", f"run.folder={run}"]
    shared += [f"run.steps={STEPS}", "run.step_tokens=128", "run.microbatch_tokens=128", "data.max_length=128"]
    shared += ["optim.lr=0.01", "save.every=2", "save.keep=9", "evaluate.every=4", "run.device=cpu", "save.trackers=[]"]
    return instead(shared, *more)


def finish(
    processes, arguments: list[str], kill_in: str | None = None, at_call: int = 0, after: float | None = None
) -> int:
    process = processes.Process(target=train, args=(arguments, kill_in, at_call))
    process.start()
    if after is not None:
        process.join(after)
        process.kill()  # nothing happens to one that is done already
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def result(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    tensors = {f"{p.stem}.{k}": v for p in checkpoint.glob("*.safetensors") for k, v in load_file(p).items()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same(run: Path, expected: Path) -> None:
    (tensors, lines), (wanted, wanted_lines) = result(run), result(expected)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert lines == wanted_lines


METHODS = {
    "full": ["model.storage=full"],
    "qlora": ["model.storage=nf4", "adapter.rank=4", "adapter.dropout=0.1"],
}


@pytest.fixture(scope="module", params=METHODS)
def uninterrupted(request, processes, base, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert finish(processes, words(base, run, *METHODS[request.param])) == 0
    return METHODS[request.param], run


@pytest.mark.parametrize(
    ("kill_in", "at_call"),
    [
        ("burnish.engine.learner:Learner._clip", 1),  # in the first step, before any checkpoint
        ("burnish.engine.learner:Learner._clip", 5),  # gradients are there, the step is not taken
        ("burnish.engine.checkpoints:save_file", 2),  # in a save, half of its files written
        ("burnish.files:_sync", 9),  # in a later save, before it takes its name
        ("burnish.engine.checkpoints:prune", 3),  # saved, not yet pruned
    ],
)
def test_killed_at_a_point_and_continued(processes, base, uninterrupted, tmp_path, kill_in, at_call):
    method, expected = uninterrupted
    run = tmp_path / "run"
    assert finish(processes, words(base, run, *method), kill_in, at_call) == -signal.SIGKILL
    assert finish(processes, words(base, run, *method, "save.resume=true")) == 0
    assert_same(run, expected)


def test_killed_again_and_again_at_any_moment(processes, base, uninterrupted, tmp_path):
    method, expected = uninterrupted
    run, moments = tmp_path / "run", random.Random(1)
    for _ in range(4):
        finish(processes, words(base, run, *method, "save.resume=true"), after=moments.uniform(0.1, 0.8))
    assert finish(processes, words(base, run, *method, "save.resume=true")) == 0
    assert_same(run, expected)


def test_asked_to_stop_saves_and_says_how_to_go_on(processes, base, uninterrupted, tmp_path):
    method, _ = uninterrupted
    run = tmp_path / "run"
    process = processes.Process(target=train, args=(words(base, run, *method, "run.steps=100000", "save.every=0"),))
    process.start()
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size == 0:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 130
    said = (tmp_path / "said").read_text()
    assert "SIGTERM" in said
    assert "save.resume=true" in said
    assert len(list((run / "checkpoints").iterdir())) == 1
