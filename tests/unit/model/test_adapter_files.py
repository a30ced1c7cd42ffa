"""PEFT folders: read by PEFT with the same logits, read from PEFT with the same logits, and strictly."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from burnish.model.adapter_config import ABOUT_FILE, CONFIG_FILE, read_about
from burnish.model.adapter_files import WEIGHTS_FILE, load_adapter, save_adapter
from burnish.model.adapters import AdapterSpec, adapter_layers, adapter_names, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from tests.tiny import tiny_batch, tiny_folder

ENDINGS = ("q_proj", "v_proj", "down_proj")
SPECS = {
    "lora": AdapterSpec("lora", rank=4, alpha=6.0),
    "rslora": AdapterSpec("lora", rank=4, alpha=6.0, rslora=True, targets=ENDINGS),
    "ranks": AdapterSpec(
        "lora", rank=4, alpha=6.0, targets=ENDINGS, rank_pattern={"q_proj": 3, r"layers\.1\.mlp\..*": 7}
    ),
    "rslora-ranks": AdapterSpec("lora", rank=4, alpha=6.0, rslora=True, targets=ENDINGS, rank_pattern={"q_proj": 3}),
    "alphas": AdapterSpec("lora", rank=4, alpha=6.0, targets=ENDINGS, alpha_pattern={"v_proj": 1.5}),
    "one-layer": AdapterSpec("lora", rank=2, alpha=8.0, targets=r"model\.layers\.1\..*_proj"),
    "dora": AdapterSpec("dora", rank=4, alpha=6.0),
    "dora-ranks": AdapterSpec("dora", rank=4, alpha=6.0, targets=ENDINGS, rank_pattern={"q_proj": 2}),
    "ia3": AdapterSpec("ia3"),
    "ia3-all": AdapterSpec("ia3", targets="all-linear"),
    "ia3-some": AdapterSpec("ia3", targets=("k_proj", "down_proj"), feedforward=("layers.0.mlp.down_proj",)),
}
FAMILIES = {"lora": "Phi3ForCausalLM", "ia3": "Qwen2ForCausalLM", "dora": "Qwen2ForCausalLM"}
specs = pytest.mark.parametrize("which", sorted(SPECS))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints: without biases, with biases, with fused layers."""
    names = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM")
    return {name: tiny_folder(tmp_path_factory.mktemp(name), name) for name in names}


def trained(base: Path, spec: AdapterSpec) -> Decoder:
    model = load_model(base, "fp32").eval()
    add_adapter(model, "policy", spec, torch.Generator().manual_seed(0))
    disturb(adapter_parameters(model, "policy"))
    return model


def disturb(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def with_peft(base: Path, folder: Path) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing tensors
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # what transformers 5.23 says of peft 0.21
        return peft.PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def difference(ours: Decoder, theirs: nn.Module, adapter: str | None) -> float:
    """The largest difference of logits, which are of size 1 and which the adapters move by more than 0.1."""
    batch = tiny_batch([23])
    logits = ours.logits(batch, adapter)
    if adapter is not None:
        assert (logits - ours.logits(batch)).abs().max() > 0.1
    return float((logits - theirs(input_ids=batch.tokens[None]).logits[0]).abs().max())


@specs
def test_peft_reads_what_we_write_with_equal_logits(which: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[FAMILIES.get(which, "LlamaForCausalLM")]
    ours = trained(base, SPECS[which])
    save_adapter(ours, "policy", tmp_path / "adapter", base=str(base))
    assert difference(ours, with_peft(base, tmp_path / "adapter"), "policy") < 2e-4


@specs
def test_it_reads_its_own_folder_and_writes_it_again_byte_for_byte(
    which: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["Qwen2ForCausalLM"]
    ours = trained(base, SPECS[which])
    save_adapter(ours, "policy", tmp_path / "first", base="owner/base")
    other = load_model(base, "fp32").eval()
    load_adapter(other, tmp_path / "first", "again")
    batch = tiny_batch([23])
    with torch.no_grad():
        assert torch.allclose(other.logits(batch, "again"), ours.logits(batch, "policy"), rtol=0, atol=2e-5)
    save_adapter(other, "again", tmp_path / "second", base="owner/base")
    load_adapter(other, tmp_path / "second", "third")
    save_adapter(other, "third", tmp_path / "third", base="owner/base")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "third" / file).read_bytes()


THEIRS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"),
    "gaussian": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="gaussian"),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj", "absent"]),
    "patterns": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(ENDINGS), rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 2}
    ),
    "regex": peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*layers\.1\..*(gate|o)_proj"),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj", "k_proj", "down_proj"]),
    "ia3": peft.IA3Config(),
    "ia3-inward": peft.IA3Config(target_modules=["q_proj", "o_proj"], feedforward_modules=["o_proj"]),
    "head": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("which", sorted(THEIRS))
def test_we_read_what_peft_writes_with_equal_logits(which: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["Qwen2ForCausalLM" if which != "head" else "LlamaForCausalLM"]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    THEIRS[which].task_type = "CAUSAL_LM"
    theirs = peft.get_peft_model(model, THEIRS[which]).eval()
    disturb({name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad})
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = load_model(base, "fp32").eval()
    load_adapter(ours, tmp_path, "theirs", base=str(base))
    assert difference(ours, theirs, "theirs") < 2e-4


def test_the_folder_is_portable(bases: dict[str, Path], tmp_path: Path) -> None:
    """vLLM reads r, lora_alpha and use_rslora: one scale for all layers, whatever their ranks."""
    base = bases["LlamaForCausalLM"]
    ours = trained(base, SPECS["ranks"])
    save_adapter(ours, "policy", tmp_path / "adapter", base="owner/base", tokenizer_folder=base)
    files = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"}
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {*files, "tokenizer_config.json"}
    text = (tmp_path / "adapter" / CONFIG_FILE).read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["r"] == 7  # the largest
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    scale = config["lora_alpha"] / config["r"]
    for path, adapter in adapter_layers(ours, "policy").items():
        down, up = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(scale * up @ down, 6.0 / adapter.rank * (adapter.B @ adapter.A).detach())


def test_what_is_said_about_an_adapter_is_read_again_and_peft_passes_it_over(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base, folder = bases["LlamaForCausalLM"], tmp_path / "adapter"
    ours = trained(base, SPECS["lora"])
    about = {"method": "sft", "base": {"fingerprint": "0123", "storage": "nf4"}}
    save_adapter(ours, "policy", folder, base="owner/base", about=about, revision="0a1b2c")
    assert read_about(folder) == about
    text = (folder / ABOUT_FILE).read_text()
    assert text == json.dumps(about, indent=2, sort_keys=True) + "\n"
    assert peft.PeftConfig.from_pretrained(folder).revision == "0a1b2c"
    assert difference(ours, with_peft(base, folder), "policy") < 2e-4
    save_adapter(ours, "policy", folder, base="owner/base")
    assert read_about(folder) == {}
    assert json.loads((folder / CONFIG_FILE).read_text())["revision"] is None
    for damaged in ("[]", "{"):
        (folder / ABOUT_FILE).write_text(damaged)
        with pytest.raises(ValueError, match=r"burnish\.json is (not JSON|damaged)"):
            read_about(folder)


def saved(bases: dict[str, Path], folder: Path, which: str = "lora") -> tuple[Decoder, Path]:
    """A model without adapters, and a folder with one for it."""
    base = bases["LlamaForCausalLM"]
    save_adapter(trained(base, SPECS[which]), "policy", folder / "adapter", base="owner/base")
    return load_model(base, "fp32"), folder / "adapter"


def rewrite(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | options))


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(FIRST), rf"lacks {FIRST}: "),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "has the unexpected extra: "),
        (lambda tensors: tensors.update({FIRST: torch.ones(4, 7)}), rf"{FIRST} is \(4, 7\), this model's is \(4, 48\)"),
        (lambda tensors: tensors[FIRST].fill_(float("nan")), rf"{FIRST} holds NaN"),
    ],
)
def test_a_wrong_tensor_is_named(bases: dict[str, Path], tmp_path: Path, change: Any, message: str) -> None:
    model, folder = saved(bases, tmp_path)
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder, "policy")
    assert adapter_names(model) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"bias": "all"}, "bias=all is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"some_future_option": 3}, "some_future_option=3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa changes the base"),
        ({"peft_type": "ADALORA"}, "peft_type is ADALORA"),
        ({"target_modules": ["nothing"]}, "names no layer"),
        ({"target_modules": ["q_proj"]}, "has the unexpected"),
        ({"r": 8}, r"is \(4, 32\), this model's is \(8, 32\): it was trained on owner/base"),
        ({"r": "four"}, "r=four must be a number"),
        ({"target_modules": None}, "target_modules must be a list"),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_name(
    bases: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model, folder = saved(bases, tmp_path)
    rewrite(folder, **options)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder, "policy")


def test_an_adapter_of_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    _, folder = saved(bases, tmp_path)
    wider = load_model(tiny_folder(tmp_path / "wider", hidden_size=64), "fp32")
    with pytest.raises(ValueError, match=r"is \(4, 32\), this model's is \(4, 64\): it was trained on owner/base"):
        load_adapter(wider, folder, "policy")
    model = load_model(bases["LlamaForCausalLM"], "fp32")
    with pytest.raises(ValueError, match="an adapter of owner/base, not of owner/other"):
        load_adapter(model, folder, "policy", base="owner/other")
    load_adapter(model, folder, "policy", base="/some/where/base")


def test_missing_and_damaged_files_are_said(bases: dict[str, Path], tmp_path: Path) -> None:
    model, folder = saved(bases, tmp_path)
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        load_adapter(model, tmp_path, "policy")
    weights = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(weights[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(model, folder, "policy")
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is not read"):
        load_adapter(model, folder, "policy")
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapter(model, folder, "policy")


def test_a_folder_that_holds_something_else_is_left_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = trained(bases["LlamaForCausalLM"], SPECS["lora"])
    with pytest.raises(ValueError, match="holds something else"):
        save_adapter(model, "policy", tmp_path, base="owner/base")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_the_adapter_of_before(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved(bases, tmp_path)
    before = (folder / WEIGHTS_FILE).read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("burnish.model.adapter_files.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapter(trained(bases["LlamaForCausalLM"], SPECS["dora"]), "policy", folder, base="owner/base")
    assert (folder / WEIGHTS_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_loaded_to_go_on_training_it_is_trainable(bases: dict[str, Path], tmp_path: Path) -> None:
    model, folder = saved(bases, tmp_path)
    load_adapter(model, folder, "policy", trainable=True)
    model.log_probs(tiny_batch([9, 5]), "policy").sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model, "policy").values())
