"""Merged folders: what transformers makes of them, what the report says, what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.model.adapter_files import save_adapter
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model, save_model
from burnish.model.weight_files import INDEX
from burnish.serve.merge import compare, merge
from tests.tiny import tiny_batch, tiny_folder

SPECS = {
    "lora": AdapterSpec("lora", rank=4, alpha=6.0),
    "dora": AdapterSpec("dora", rank=4, alpha=6.0, targets=("q_proj", "down_proj")),
    "ia3": AdapterSpec("ia3"),
}
EMBEDDING = "model.embed_tokens.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
kinds = pytest.mark.parametrize("kind", sorted(SPECS))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with biases, in several shards."""
    folder = tiny_folder(tmp_path_factory.mktemp("qwen"), "Qwen2ForCausalLM")
    split(folder)
    return folder


def split(folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Rewrite the checkpoint as two shards."""
    tensors = tensors or load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    (folder / "model.safetensors").unlink()
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def adapter(base: Path, folder: Path, kind: str, storage: str = "fp32") -> tuple[Path, Tensor]:
    """A folder with a disturbed adapter, and the logits of base and adapter together."""
    model = load_model(base, storage).eval()
    add_adapter(model, "policy", SPECS[kind], torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model, "policy").values():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, "policy", folder / "adapter", base=str(base))
    with torch.no_grad():
        return folder / "adapter", model.logits(tiny_batch([23]), "policy")


@torch.no_grad()
def transformers_logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(input_ids=tiny_batch([23]).tokens[None]).logits[0]


@kinds
def test_transformers_loads_the_merged_model_with_equal_logits(kind: str, base: Path, tmp_path: Path) -> None:
    folder, logits = adapter(base, tmp_path, kind)
    report = merge(base, folder, tmp_path / "merged")
    torch.testing.assert_close(transformers_logits(tmp_path / "merged"), logits, rtol=0, atol=2e-4)
    assert report["max_abs_logit_error"] < 1e-4
    assert report["same_argmax"] == 1.0
    assert report["kl"] < 1e-8
    assert json.loads(json.dumps(report)) == report
    names = {file.name for file in base.iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == names
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@kinds
def test_onto_nf4_it_is_the_quantised_base_that_is_merged_into(kind: str, base: Path, tmp_path: Path) -> None:
    folder, logits = adapter(base, tmp_path, kind, "nf4")
    report = merge(base, folder, tmp_path / "merged", onto="nf4")
    # Embeddings are kept in bf16 beside NF4, where the merged model has the base's fp32.
    torch.testing.assert_close(transformers_logits(tmp_path / "merged"), logits, rtol=0, atol=0.05)
    assert report["mean_abs_logit_error"] < 0.005
    onto_weights = merge(base, folder, tmp_path / "other")
    model = load_model(base, "nf4").eval()
    with torch.no_grad():
        wrong = (transformers_logits(tmp_path / "other") - logits).abs().mean()
    assert wrong > 10 * report["mean_abs_logit_error"]
    assert onto_weights["mean_abs_logit_error"] < 1e-4
    merged = load_model(tmp_path / "merged", "fp32")
    layer, other = (m.model.layers[0].self_attn.o_proj for m in (merged, model))
    if kind == "ia3":  # a layer without an adapter is the dequantised one as well
        assert torch.equal(layer.stored.dense(torch.float32), other.stored.dense(torch.float32))


def test_a_16_bit_base_is_rounded_once(base: Path, tmp_path: Path) -> None:
    half = tiny_folder(tmp_path / "half")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    folder, _ = adapter(half, tmp_path, "lora", "bf16")
    report = merge(half, folder, tmp_path / "merged", tokens=(3, 5, 7, 11))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    parts = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged.values())
    for name, tensor in tensors.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora"
        expected = tensor.double()
        if f"{key}_A.weight" in parts:
            expected = expected + 1.5 * parts[f"{key}_B.weight"].double() @ parts[f"{key}_A.weight"].double()
        exact = expected.bfloat16() == merged[name]
        # fp32 sums differ from float64's in the last place, which tips a tie of bf16 once in some thousands.
        assert exact.float().mean() > 0.999, name
    assert 0 < report["max_abs_logit_error"] < 0.2
    assert report["tokens"] == 4


def test_a_bitsandbytes_base_becomes_a_dense_model(tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense")
    folder, logits = adapter(dense, tmp_path, "lora", "nf4")
    base = tmp_path / "base"
    save_model(load_model(dense, "nf4"), base, dense, dtype=torch.float32, max_shard_bytes=50_000, bitsandbytes=True)
    assert len(list(base.glob("*.safetensors"))) > 1
    report = merge(base, folder, tmp_path / "merged")
    torch.testing.assert_close(transformers_logits(tmp_path / "merged"), logits, rtol=0, atol=0.05)
    assert report["mean_abs_logit_error"] < 0.005
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-1]), "damaged or cut short"),
        (lambda shard: shard.write_bytes(b"junk" * 9), "damaged or cut short"),
        (lambda shard: shard.unlink(), "the index names this file, but it is not there"),
        (lambda shard: (shard.parent / INDEX).write_text("[]"), "not an index"),
        (lambda shard: (shard.parent / INDEX).unlink(), "holds no model.safetensors"),
        (lambda shard: rewrite(shard, lambda t: t.popitem()), "is missing from the checkpoint"),
        (lambda shard: rewrite(shard, lambda t: t.update(spare=torch.ones(1))), "spare is not part of"),
        (lambda shard: rewrite(shard, lambda t: t[EMBEDDING][0].fill_(torch.nan)), "embed_tokens.weight holds NaN"),
        (lambda shard: rewrite(shard, lambda t: t.update({Q: t[Q].T.contiguous()[:3]})), "q_proj.weight has shape"),
        (lambda shard: rewrite(shard, lambda t: t[Q][1, 2].fill_(torch.inf)), "q_proj.weight holds NaN or infinite"),
    ],
)
def test_a_damaged_base_is_refused_as_it_is_where_it_would_be_trained(
    damage: Callable[[Path], object], message: str, base: Path, tmp_path: Path
) -> None:
    folder, _ = adapter(base, tmp_path, "lora")
    broken = shutil.copytree(base, tmp_path / "broken")
    damage(broken / json.loads((broken / INDEX).read_text())["weight_map"][Q])
    with pytest.raises(ValueError, match=message) as loading:
        load_model(broken, "fp32")
    with pytest.raises(ValueError, match=message) as merging:
        merge(broken, folder, tmp_path / "merged", check=False)
    assert str(merging.value) == str(loading.value)
    assert "\n" not in str(merging.value)
    assert not (tmp_path / "merged").exists()


def test_the_tokenizer_that_the_adapter_was_trained_with_goes_along(base: Path, tmp_path: Path) -> None:
    folder, _ = adapter(base, tmp_path, "lora")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    report = merge(base, folder, str(tmp_path / "merged"), check=False)
    assert report == {"out": str(tmp_path / "merged"), "onto": "weights", "layers": 14}
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_what_cannot_be_merged_is_refused_and_nothing_written(base: Path, tmp_path: Path) -> None:
    folder, _ = adapter(base, tmp_path, "lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        merge(base, folder, tmp_path / "full")
    other = tiny_folder(tmp_path / "other", hidden_size=64)
    with pytest.raises(ValueError, match="it was trained on"):
        merge(other, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_the_comparison_of_logits_is_that_of_its_definition() -> None:
    first = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    second = torch.tensor([[0.0, 1.5], [0.0, 1.0]])
    p, q = first.softmax(1), second.softmax(1)
    result = compare(first, second)
    assert result["max_abs_logit_error"] == 2.0
    assert result["mean_abs_logit_error"] == pytest.approx((0 + 0.5 + 2 + 1) / 4)
    assert result["same_argmax"] == 0.5
    assert result["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()), abs=1e-6)


def test_an_adapter_on_a_tied_head_is_not_merged(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=True)
    model = load_model(base, "fp32")
    add_adapter(model, "policy", AdapterSpec(rank=2, targets=("lm_head",)))
    save_adapter(model, "policy", tmp_path / "adapter", str(base))
    with pytest.raises(ValueError, match="is the embedding matrix itself"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match="is the embedding matrix itself"):
        save_model(model, tmp_path / "merged", base, adapter="policy")
    assert not (tmp_path / "merged").exists()
