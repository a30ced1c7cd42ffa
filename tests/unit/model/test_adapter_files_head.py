"""Adapters with a scalar head: PEFT and transformers read the same scores, we read theirs, and nothing is dropped."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish.model.adapter_config import CONFIG_FILE, read_about
from burnish.model.adapter_files import WEIGHTS_FILE, load_adapter, save_adapter
from burnish.model.adapters import AdapterSpec, adapter_names, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.model.heads import add_head, head_parameters
from burnish.ops.sequences import sequence_last
from tests.tiny import tiny_batch, tiny_folder

LENGTHS = (11, 4, 19, 7)
WEIGHT, BIAS = "base_model.model.score.weight", "base_model.model.score.bias"
SPECS = {
    "lora": AdapterSpec("lora", rank=4, alpha=6.0),
    "rslora-ranks": AdapterSpec(
        "lora", rank=4, alpha=6.0, rslora=True, targets=("q_proj", "down_proj"), rank_pattern={"q_proj": 3}
    ),
    "dora": AdapterSpec("dora", rank=4, alpha=6.0),
    "ia3": AdapterSpec("ia3"),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
    return {name: tiny_folder(tmp_path_factory.mktemp(name), name) for name in names}


def disturb(parameters: dict[str, nn.Parameter], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def trained(base: Path, which: str = "lora", bias: float = 0.0) -> Decoder:
    """A model with a trained adapter `policy` whose head is called `reward`."""
    model = load_model(base, "fp32").eval()
    add_adapter(model, "policy", SPECS[which], torch.Generator().manual_seed(0))
    disturb(adapter_parameters(model, "policy"))
    head = add_head(model, "reward", 32, torch.Generator().manual_seed(2))
    head.bias.data.fill_(bias)
    return model


def with_peft(base: Path, folder: Path) -> nn.Module:
    transformers.logging.set_verbosity_error()  # the head is random until PEFT has put the adapter's in its place
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing tensors
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
        return peft.PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def our_scores(model: Decoder, adapter: str, head: str) -> Tensor:
    batch = tiny_batch(LENGTHS)
    return sequence_last(model.values(batch, head, adapter), batch)


@torch.no_grad()
def their_scores(model: nn.Module) -> Tensor:
    """Of padded rows: id 0 pads, which `tiny_batch` never draws."""
    rows = torch.nn.utils.rnn.pad_sequence(tiny_batch(LENGTHS).tokens.split(LENGTHS), batch_first=True)
    return model(input_ids=rows, attention_mask=rows != 0).logits[:, 0]


@pytest.mark.parametrize("which", sorted(SPECS))
@pytest.mark.parametrize("base", ["LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM"])
def test_peft_reads_the_same_scores(which: str, base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    ours = trained(bases[base], which)
    save_adapter(ours, "policy", tmp_path / "adapter", base=str(bases[base]), head="reward")
    expected = our_scores(ours, "policy", "reward")
    assert expected.std() > 0.3
    torch.testing.assert_close(their_scores(with_peft(bases[base], tmp_path / "adapter")), expected, rtol=0, atol=5e-5)


def test_a_bias_travels_and_peft_passes_it_over(bases: dict[str, Path], tmp_path: Path) -> None:
    base, folder = bases["LlamaForCausalLM"], tmp_path / "adapter"
    ours = trained(base, bias=1.7)
    save_adapter(ours, "policy", folder, base=str(base), head="reward", about={"kind": "value"})
    assert load_file(folder / WEIGHTS_FILE)[BIAS].tolist() == [pytest.approx(1.7)]
    again = load_model(base, "fp32").eval()
    load_adapter(again, folder, "value", head="value")
    assert torch.equal(our_scores(again, "value", "value"), our_scores(ours, "policy", "reward"))
    theirs = their_scores(with_peft(base, folder))
    torch.testing.assert_close(theirs + 1.7, our_scores(ours, "policy", "reward"), rtol=0, atol=5e-5)
    assert read_about(folder) == {"kind": "value"}


def test_the_config_says_what_peft_says(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["LlamaForCausalLM"]
    save_adapter(trained(base), "policy", tmp_path / "adapter", base=str(base), head="reward")
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert tensors[WEIGHT].shape == (1, 32)
    assert BIAS not in tensors  # it is 0, as in every model of transformers


def test_it_reads_its_own_folder_bit_for_bit(bases: dict[str, Path], tmp_path: Path) -> None:
    base, folder = bases["LlamaForCausalLM"], tmp_path / "adapter"
    ours = trained(base)
    save_adapter(ours, "policy", folder, base="owner/base", head="reward")
    again = load_model(base, "fp32").eval()
    load_adapter(again, folder, "reward", head="reward")
    assert torch.equal(our_scores(again, "reward", "reward"), our_scores(ours, "policy", "reward"))
    frozen = {**adapter_parameters(again, "reward"), **head_parameters(again, "reward")}
    assert not any(parameter.requires_grad for parameter in frozen.values())
    load_adapter(again, folder, "value", trainable=True, head="value")  # a value model begins as the reward model
    assert all(parameter.requires_grad for parameter in head_parameters(again, "value").values())
    assert torch.equal(our_scores(again, "value", "value"), our_scores(again, "reward", "reward"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_we_read_what_peft_writes(targets: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["Qwen2ForCausalLM"]
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="SEQ_CLS")
    theirs = peft.get_peft_model(model, config).eval()
    disturb({name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad})
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = load_model(base, "fp32").eval()
    load_adapter(ours, tmp_path, "reward", head="reward")
    torch.testing.assert_close(our_scores(ours, "reward", "reward"), their_scores(theirs), rtol=0, atol=5e-5)


def test_an_adapter_on_the_language_models_head_is_left_out(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["LlamaForCausalLM"]
    ours = load_model(base, "fp32").eval()
    add_adapter(ours, "policy", AdapterSpec("lora", rank=2, targets=("q_proj", "lm_head")), torch.Generator())
    disturb(adapter_parameters(ours, "policy"))
    add_head(ours, "reward", 32, torch.Generator().manual_seed(2))
    save_adapter(ours, "policy", tmp_path / "adapter", base=str(base), head="reward")
    assert not any("lm_head" in name for name in load_file(tmp_path / "adapter" / WEIGHTS_FILE))
    theirs = their_scores(with_peft(base, tmp_path / "adapter"))
    torch.testing.assert_close(theirs, our_scores(ours, "policy", "reward"), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(WEIGHT), rf"lacks {WEIGHT}: "),
        (
            lambda tensors: tensors.update({WEIGHT: torch.ones(2, 32)}),
            rf"{WEIGHT} is \(2, 32\), this model's is \(1, 32\)",
        ),
        (lambda tensors: tensors.update({BIAS: torch.ones(2)}), rf"{BIAS} is \(2,\), this model's is \(1,\)"),
        (lambda tensors: tensors[WEIGHT].fill_(float("inf")), rf"{WEIGHT} holds NaN or infinity"),
    ],
)
def test_a_head_that_is_missing_or_wrong_is_an_error(
    bases: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    base, folder = bases["LlamaForCausalLM"], tmp_path / "adapter"
    save_adapter(trained(base), "policy", folder, base="owner/base", head="reward")
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    model = load_model(base, "fp32")
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder, "reward", head="reward")
    assert adapter_names(model) == []
    assert not model.heads


def test_what_scores_and_what_writes_are_told_apart(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["LlamaForCausalLM"]
    ours = trained(base)
    save_adapter(ours, "policy", tmp_path / "reward", base="owner/base", head="reward", about={"kind": "reward"})
    save_adapter(ours, "policy", tmp_path / "writes", base="owner/base")
    model = load_model(base, "fp32")
    with pytest.raises(ValueError, match="reward is the adapter of a reward model, which gives numbers and writes no"):
        load_adapter(model, tmp_path / "reward", "policy")
    with pytest.raises(ValueError, match="writes is the adapter of a language model, without a head that scores"):
        load_adapter(model, tmp_path / "writes", "reward", head="reward")
    assert adapter_names(model) == []
    assert not model.heads
    tensors = load_file(tmp_path / "writes" / WEIGHTS_FILE)
    save_file({**tensors, WEIGHT: torch.ones(1, 32)}, tmp_path / "writes" / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=f"has the unexpected {WEIGHT}"):
        load_adapter(model, tmp_path / "writes", "policy")
