"""Amounts of memory of which no plan is made: they must hold at least the weights."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from burnish.config import build
from burnish.engine.assemble import lay_out, open_model
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.model.decoder import Decoder
from burnish.settings import TrainingSettings
from tests.tiny import tiny_folder

HERE = Mesh(torch.device("cpu"))


def opened(folder: Path, memory: str, **run: object) -> Decoder:
    groups = {"model": {"storage": "full"}, "run": {"device": "cpu", "memory": memory, **run}}
    settings = build(TrainingSettings, groups)
    return open_model(Start(folder), settings.model, settings.adapter, settings.run, HERE)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model")


def megabytes(decoder: Decoder) -> float:
    """What the weights take, all of which are fp32 here."""
    return 4 * sum(parameter.numel() for parameter in decoder.parameters()) / 1e6


def test_an_amount_must_hold_the_weights(folder: Path) -> None:
    size = megabytes(opened(folder, "least"))
    opened(folder, f"{size + 0.001:.6f}MB")
    too_little = f"{size - 0.001:.6f}MB"
    with pytest.raises(ValueError, match="is too little") as error:
        opened(folder, too_little)
    start, _, rest = str(error.value).partition(" alone take ")
    assert start == f"run.memory={too_little} is too little: the weights"
    named, _, advice = rest.partition("MB; ")
    assert size <= float(named) < size + 0.1
    assert advice == "write a larger amount, or run.memory=auto"


def test_each_rank_must_hold_its_share(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = opened(folder, "auto")
    share = megabytes(decoder) / 4
    enough, short = (
        build(TrainingSettings, {"model": {"storage": "full"}, "run": {"memory": f"{share * part:.6f}MB"}}).run
        for part in (1.01, 0.99)
    )
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    lay_out(decoder, enough, HERE)  # as it is gathered on the host, to be written
    with pytest.raises(ValueError, match="the weights of each of 4 ranks alone take"):
        lay_out(decoder, short, HERE)
