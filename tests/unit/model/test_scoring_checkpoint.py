"""Reward models as folders for sequence classification: transformers reads ours and we read theirs, score by score."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.model.checkpoint import base_fingerprint, load_model, save_model
from burnish.model.decoder import Decoder
from burnish.model.families import FAMILIES, read_config, scoring_name
from burnish.model.heads import add_head
from burnish.ops.sequences import sequence_last
from tests.tiny import randomize, tiny_batch, tiny_folder, tiny_tokenizer

LENGTHS = (11, 4, 19, 7)
WRITERS = sorted(set(FAMILIES) - {"Gemma3ForConditionalGeneration"})


@torch.no_grad()
def our_scores(model: Decoder) -> Tensor:
    batch = tiny_batch(LENGTHS)
    return sequence_last(model.values(batch, "reward"), batch)


@torch.no_grad()
def their_scores(folder: Path) -> Tensor:
    """Of padded rows: id 0 pads, which `tiny_batch` never draws."""
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = torch.nn.utils.rnn.pad_sequence(tiny_batch(LENGTHS).tokens.split(LENGTHS), batch_first=True)
    return model(input_ids=rows, attention_mask=rows != 0).logits[:, 0]


def with_head(folder: Path, storage: str = "full", bias: float = 0.0) -> Decoder:
    model = load_model(folder, storage).eval()
    head = add_head(model, "reward", model.config.hidden_size, torch.Generator().manual_seed(2))
    head.bias.data.fill_(bias)
    return model


@pytest.mark.parametrize("writer", WRITERS)
def test_transformers_reads_the_same_scores(writer: str, tmp_path: Path) -> None:
    ours = with_head(tiny_folder(tmp_path / "base", writer))
    save_model(ours, tmp_path / "reward", tmp_path / "base", torch.float32, head="reward")
    assert our_scores(ours).std() > 0.3
    torch.testing.assert_close(their_scores(tmp_path / "reward"), our_scores(ours), rtol=0, atol=1e-4)
    again = load_model(tmp_path / "reward", "fp32", head="reward").eval()
    assert torch.equal(our_scores(again), our_scores(ours))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Gemma3Text", "Phi3"])
def test_we_read_what_transformers_writes(family: str, tmp_path: Path) -> None:
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    settings = {
        **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "num_labels": 1},
        **{"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None},
    }
    model = kind(kind.config_class(**settings))
    randomize(model)
    model.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    ours = load_model(tmp_path, "fp32", head="reward").eval()
    assert ours.config.architecture == f"{family}ForSequenceClassification"
    torch.testing.assert_close(our_scores(ours), their_scores(tmp_path), rtol=0, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert all(parameter.requires_grad for parameter in load_model(tmp_path, "full", head="reward").parameters())
    load_model(tmp_path, "nf4", head="reward")


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    ours = with_head(tiny_folder(tmp_path / "base"))
    save_model(ours, tmp_path / "reward", tmp_path / "base", torch.float32, head="reward")
    return tmp_path / "reward"


def test_a_bias_is_kept_and_transformers_passes_it_over(reward: Path, tmp_path: Path) -> None:
    ours = with_head(tmp_path / "base", bias=-0.6)
    save_model(ours, tmp_path / "value", tmp_path / "base", torch.float32, head="reward")
    assert torch.equal(our_scores(load_model(tmp_path / "value", "fp32", head="reward")), our_scores(ours))
    torch.testing.assert_close(their_scores(tmp_path / "value") - 0.6, our_scores(ours), rtol=0, atol=1e-4)


def test_the_head_keeps_its_32_bits_in_a_file_of_16(tmp_path: Path) -> None:
    ours = with_head(tiny_folder(tmp_path / "base"))
    save_model(ours, tmp_path / "reward", tmp_path / "base", torch.bfloat16, head="reward")
    stored = load_file(tmp_path / "reward" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(stored["score.weight"], ours.heads["reward"].weight.detach())
    assert not any("lm_head" in name for name in stored)


def test_the_trunk_has_the_fingerprint_of_the_model_that_writes(reward: Path, tmp_path: Path) -> None:
    assert base_fingerprint(reward) == base_fingerprint(tmp_path / "base")


@pytest.mark.parametrize(
    ("change", "pad"),
    [
        ({}, 0),
        ({"pad_token_id": 2}, 0),  # the end token, which config.json calls padding: the tokenizer has another
        ({"pad_token_id": None, "tokenizer": {"pad_token": "<|im_end|>", "unk_token": "<|im_start|>"}}, 1),
        ({"pad_token_id": None, "tokenizer": {"pad_token": "<|im_end|>"}}, None),
        ({"pad_token_id": None, "eos_token_id": [0, 2]}, None),
    ],
)
def test_padding_is_a_token_that_ends_nothing(tmp_path: Path, change: dict[str, Any], pad: int | None) -> None:
    base = tiny_folder(tmp_path / "base")
    for name in ("config.json", "tokenizer_config.json"):
        told = change.get("tokenizer", {}) if name == "tokenizer_config.json" else change
        stored = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(stored | {k: v for k, v in told.items() if k != "tokenizer"}))
    save_model(with_head(base), tmp_path / "reward", base, torch.float32, head="reward")
    assert json.loads((tmp_path / "reward" / "config.json").read_text())["pad_token_id"] == pad


def test_a_missing_head_is_an_error(reward: Path) -> None:
    tensors = load_file(reward / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, reward / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"score\.weight is missing from the checkpoint"):
        load_model(reward, head="reward")


def test_what_scores_and_what_writes_are_told_apart(reward: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a LlamaForSequenceClassification gives scores and writes no text"):
        load_model(reward)
    with pytest.raises(ValueError, match="a LlamaForCausalLM writes text and has no head that scores"):
        load_model(tmp_path / "base", head="reward")
    config = json.loads((reward / "config.json").read_text())
    (reward / "config.json").write_text(json.dumps(config | {"id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(ValueError, match="gives one number, this LlamaForSequenceClassification has 2 labels"):
        read_config(reward, scores=True)


def test_every_family_has_a_class_that_scores() -> None:
    for writer in FAMILIES:
        assert hasattr(transformers, scoring_name(writer))
