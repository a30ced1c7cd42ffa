"""Adapters that are laid over weights of another kind than those that they were trained on: what is said of it."""

import json
from pathlib import Path

import pytest
import torch

from burnish.config import parse
from burnish.engine.start import begin
from burnish.engine.trained import open_trained, tell_storage
from burnish.model.adapter_files import save_adapter
from burnish.model.adapters import AdapterSpec, add_adapter
from burnish.model.checkpoint import init_model
from burnish.recipes.sft import Config
from burnish.settings import TrainedModelSettings
from burnish.tools import merge
from tests.tiny import tiny_folder

ON_OTHERS = "was trained on NF4 weights and is used on others, which it has not seen: {}=nf4 gives it those"
ON_NF4 = "was not trained on NF4 weights, on which it is used: another {} than nf4 gives it what it has seen"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "base")


def adapter(base: Path, storage: str | None) -> Path:
    """Of a run with this storage; PEFT's own does not say."""
    decoder, folder = init_model(base, 0, "bf16"), base.parent / f"adapter-{storage}"
    add_adapter(decoder, "policy", AdapterSpec(rank=2), torch.Generator().manual_seed(0))
    about = None if storage is None else {"storage": storage, "double_quant": True}
    save_adapter(decoder, "policy", folder, str(base), about=about)
    return folder


@pytest.mark.parametrize(
    ("trained", "used", "said"),
    [
        ("nf4", "bf16", ON_OTHERS),
        ("nf4", "fp32", ON_OTHERS),
        ("bf16", "nf4", ON_NF4),
        ("nf4", "nf4", ""),
        ("bf16", "fp32", ""),
        (None, "nf4", ""),
        (None, "bf16", ""),
    ],
)
def test_other_weights_than_those_of_its_training_are_told_in_a_line(
    base: Path, capsys: pytest.CaptureFixture[str], trained: str | None, used: str, said: str
) -> None:
    folder = adapter(base, trained)
    told = f"the adapter in {folder} {said.format('model.storage')}\n" if said else ""
    tell_storage(folder, base, used)
    assert capsys.readouterr().err == told
    begin(parse(Config, [f"from={folder}", f"model.storage={used}"]))
    assert capsys.readouterr().err == told
    open_trained(TrainedModelSettings(adapter=str(folder), storage=used))  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().err == told
    begin(parse(Config, [f"from={folder}"]))  # which takes what the adapter was trained on
    open_trained(TrainedModelSettings(adapter=str(folder)))
    assert capsys.readouterr().err == ""


def test_a_base_whose_files_are_nf4_gives_every_storage_the_same(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = adapter(base, "nf4"), json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    tell_storage(folder, base, "bf16")
    assert capsys.readouterr().err == ""


def test_merging_onto_others_is_told(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for storage, onto, said in (("nf4", "weights", ON_OTHERS), ("bf16", "nf4", ON_NF4), ("nf4", "nf4", "")):
        folder, out = adapter(base, storage), base.parent / f"{storage}-{onto}"
        words = [f"model.adapter={folder}", f"out={out}", f"onto={onto}"]
        merge.main(parse(merge.Config, words), as_json=True)
        told = f"the adapter in {folder} {said.format('onto')}\n" if said else ""
        assert capsys.readouterr().err == told


def test_ranks_other_than_the_first_say_nothing(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    begin(parse(Config, [f"from={adapter(base, 'nf4')}", "model.storage=bf16"]))
    assert capsys.readouterr().err == ""
