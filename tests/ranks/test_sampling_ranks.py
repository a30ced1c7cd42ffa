"""Two gloo ranks that share every weight (FSDP2) write many answers or none, and each what one rank writes."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from burnish.engine.mesh import open_mesh, shard, whole
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.sampling.sampler import Sampler, Sampling
from tests.tiny import forkserver, tiny_batch, tiny_folder

SHARES = {"uneven": (9, 2), "none": (0, 3), "equal": (4, 4), "nothing": (0, 0)}
SAMPLING = Sampling(14, 1.0, end_ids=range(0, 320, 9))
SLOTS = 3


def opened(folder: Path) -> Decoder:
    model = load_model(folder, "nf4")
    add_adapter(model, "a", AdapterSpec(rank=2, dropout=0.5), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(model, "a").values():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def prompts_of(rank: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(0, 320, (2 + 5 * i % 17,), generator=generator).tolist() for i in range(count)]


def seeds_of(rank: int, count: int) -> list[int]:
    return [1000 * rank + i for i in range(count)]


def write(folder: Path, out: Path, rank: int, port: int) -> None:
    """One rank: it writes its share of each workload, and then learns something."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with open_mesh("cpu") as mesh:
        model = opened(folder)
        shard(model, model.model.layers, mesh)
        sampler = Sampler(model, SLOTS, mesh)
        found = {}
        for name, shares in SHARES.items():
            prompts, seeds = prompts_of(rank, shares[rank]), seeds_of(rank, shares[rank])
            found[name] = sampler.write(prompts, SAMPLING, "a", seeds)
        model.log_probs(tiny_batch((9, 5)), "a").sum().backward()
        gradients = [parameter.grad for parameter in adapter_parameters(model, "a").values()]
        assert all(gradient is not None and whole(gradient).any() for gradient in gradients)
    out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("ranks") / "model")


def test_ranks_with_different_workloads_write_what_one_rank_writes(folder, tmp_path):
    context = forkserver()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    outs = [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [context.Process(target=write, args=(folder, outs[rank], rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    sampler = Sampler(opened(folder), SLOTS)
    for rank, out in enumerate(outs):
        found = json.loads(out.read_text())
        for name, shares in SHARES.items():
            expected = sampler.write(prompts_of(rank, shares[rank]), SAMPLING, "a", seeds_of(rank, shares[rank]))
            assert [(tuple(ids), ended) for ids, ended in found[name]] == expected
