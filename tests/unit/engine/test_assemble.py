"""Amounts of memory of which no plan is made: they must hold at least the weights."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from burnish.config import build
from burnish.engine import assemble
from burnish.engine.assemble import lay_out, open_model
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.model.decoder import Decoder
from burnish.model.shapes import SHAPES
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


@pytest.mark.parametrize("adapter", [{"kind": "dora"}, {"kind": "ia3"}, {"dropout": 0.1}, {"kind": "lora"}])
def test_an_amount_that_no_plan_keeps_to_is_told_and_must_hold_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], adapter: dict[str, object]
) -> None:
    """On a device with kernels and a memory of its own all blocks have a planner, and not all of them ask it."""
    monkeypatch.setattr(assemble, "runs_kernels", lambda device: True)
    monkeypatch.setattr(assemble, "has_host", lambda device: True)
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny"]))

    def laid_out(memory: str) -> str:
        run = {"device": "cpu", "dtype": "bf16", "memory": memory}
        groups = {"model": {"init": "random"}, "adapter": adapter, "run": run}
        settings = build(TrainingSettings, groups)
        decoder, _ = open_model(Start(tmp_path), settings.model, settings.adapter, settings.run, HERE)
        assert decoder.planner is not None
        return capsys.readouterr().err

    planned = adapter == {"kind": "lora"}
    told = "run.memory=1GB is compared with the weights alone: for this model, adapter, "
    assert laid_out("1GB").startswith(told) != planned
    assert laid_out("auto") == laid_out("least") == ""
    if not planned:
        with pytest.raises(ValueError, match=r"run\.memory=0\.01MB is too little: the weights alone take"):
            laid_out("0.01MB")


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
