import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from burnish.model.adapters import ADAPTERS, AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import base_fingerprint, load_model, save_model
from burnish.model.decoder import Decoder
from burnish.model.weight_files import WeightFiles
from tests.tiny import tiny_batch, tiny_folder

BATCH = tiny_batch((9, 4))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def rewrite(folder: Path, change: Any) -> None:
    """Passes the checkpoint's tensors through a function that changes the dict in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def logits(model: Decoder, adapter: str | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(BATCH, adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "and 6 more are missing"),
        (lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}), "mlp.extra.weight is not part of"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            "model.norm.weight has shape (31,) where config.json asks for (32,)",
        ),
        (lambda t: t["model.layers.1.self_attn.q_proj.weight"][3, 4].fill_(torch.nan), "q_proj.weight holds NaN"),
        (lambda t: t["model.norm.weight"][3].fill_(torch.inf), "model.norm.weight holds NaN or infinite"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)}),
            "up_proj.weight is torch.int8",
        ),
    ],
)
def test_a_wrong_tensor_is_named(folder: Path, change: Any, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(ValueError, match="^" + str(folder)) as error:
        load_model(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"^{file}: damaged or cut short"):
        load_model(folder)


def test_missing_files_are_named(folder: Path) -> None:
    save_model(load_model(folder, "fp32"), folder / "sharded", folder, max_shard_bytes=20_000)
    shard = next((folder / "sharded").glob("model-00002*"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"^{shard}: the index names this file"):
        load_model(folder / "sharded")
    (folder / "sharded" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of safetensors files"):
        load_model(folder / "sharded")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_model(folder)


def test_checkpoints_without_the_model_prefix_are_read(original: Path, folder: Path) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as old Llama files have it

    rewrite(folder, shorten)
    assert torch.equal(logits(load_model(folder, "fp32")), logits(load_model(original, "fp32")))


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "Qwen2ForCausalLM", tie_word_embeddings=True)
    expected = logits(load_model(folder, "fp32"))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load_model(folder, "full")
    assert torch.equal(logits(model), expected)
    assert model.lm_head.stored.weight is model.model.embed_tokens.weight
    rewrite(folder, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(folder)


@pytest.mark.parametrize("storage", ["full", "nf4"])
def test_the_model_does_not_change_with_its_file(original: Path, folder: Path, storage: str) -> None:
    if storage == "nf4":
        save_model(load_model(original, "nf4"), folder, original, bitsandbytes=True)
    model = load_model(folder, storage)
    before = logits(model)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-20_000, 2)
        file.write(b"\x07" * 20_000)
    assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes and of what it imports
def test_a_bitsandbytes_checkpoint_gives_what_transformers_makes_of_it(tmp_path: Path) -> None:
    import transformers

    folder = tiny_folder(tmp_path / "dense", hidden_size=64, intermediate_size=128)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    oracle = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    oracle.save_pretrained(tmp_path / "nf4")
    ids = BATCH.tokens[None, :9]
    # With gradients on: without, bitsandbytes takes a CPU path of its own in lower precision.
    expected = oracle(ids).logits[0].detach()
    ours = logits(load_model(tmp_path / "nf4", "fp32"))
    torch.testing.assert_close(ours[:9], expected, rtol=1e-4, atol=1e-4)
    kept, made = load_model(tmp_path / "nf4", "nf4"), load_model(folder, "nf4")
    for name, parameter in kept.named_parameters():
        if name.endswith("codes"):  # its CPU backend rounds one in a thousand of the scales another way
            assert torch.equal(parameter, made.get_parameter(name)), name


@pytest.mark.parametrize("storage", ["bf16", "fp32", "nf4"])
def test_what_is_saved_is_what_the_weights_stand_for(original: Path, tmp_path: Path, storage: str) -> None:
    model = load_model(original, storage)
    save_model(model, tmp_path / "saved", original, dtype=torch.float32)
    assert torch.equal(logits(load_model(tmp_path / "saved", "fp32")), logits(model))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["dtype"] == "float32"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (original / name).read_bytes()


def test_shards_stay_below_their_size_and_hold_every_tensor_once(original: Path, tmp_path: Path) -> None:
    save_model(load_model(original), tmp_path / "saved", original, max_shard_bytes=25_000)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
            size = sum(handle.get_tensor(name).nbytes for name in names)
            assert all(handle.get_tensor(name).dtype == torch.bfloat16 for name in names)
        assert size <= 25_000
        assert not set(names) & held.keys()
        held |= dict.fromkeys(names, file.name)
    assert held == index["weight_map"]
    assert held.keys() == load_file(original / "model.safetensors").keys()


def test_a_save_that_fails_leaves_what_was_there(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = load_model(original), tmp_path / "saved"
    save_model(model, target, original)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("burnish.model.weight_files._write_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, target, original, dtype=torch.float32)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_a_merged_model_gives_the_logits_of_the_adapted_one(tmp_path: Path, kind: str) -> None:
    folder = tiny_folder(tmp_path / "qwen", "Qwen2ForCausalLM")  # it has biases
    model = load_model(folder, "fp32")
    add_adapter(model, "a", AdapterSpec(kind=kind, rank=2), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(model, "a").values():
        torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    save_model(model, tmp_path / "merged", folder, dtype=torch.float32, adapter="a")
    merged = logits(load_model(tmp_path / "merged", "fp32"))
    assert not torch.allclose(merged, logits(model), atol=0.1)
    torch.testing.assert_close(merged, logits(model, "a"), rtol=1e-4, atol=1e-4)


def test_the_fingerprint_is_that_of_the_weights_and_not_of_their_files(original: Path, tmp_path: Path) -> None:
    model = load_model(original, "bf16")
    folders = {name: tmp_path / name for name in ("bf16", "fp32", "sharded", "short", "tied")}
    save_model(model, folders["bf16"], original)
    save_model(model, folders["fp32"], original, dtype=torch.float32)
    save_model(model, folders["sharded"], original, max_shard_bytes=20_000)
    for name in ("short", "tied"):
        shutil.copytree(folders["bf16"], folders[name])
    rewrite(folders["short"], lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t)])
    rewrite(folders["tied"], lambda t: t.pop("lm_head.weight"))
    prints = {base_fingerprint(folder) for folder in (original, *folders.values())}  # the original is fp32
    assert len(prints) == 1
    assert re.fullmatch("[0-9a-f]{16}", prints.pop())


@pytest.mark.parametrize("name", ["embed_tokens", "norm", "layers.1.mlp.down_proj", "layers.0.input_layernorm"])
def test_the_fingerprint_of_a_model_with_one_other_weight_is_another(original: Path, folder: Path, name: str) -> None:
    rewrite(folder, lambda t: t[f"model.{name}.weight"].mul_(1.5))
    assert base_fingerprint(folder) != base_fingerprint(original)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes and of what it imports
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])  # an own head; biases, a tied one
def test_four_bits_are_written_for_bitsandbytes_and_read_again_bit_for_bit(
    tmp_path: Path, architecture: str, double_quant: bool
) -> None:
    import transformers

    tied = architecture == "Qwen2ForCausalLM"
    # bitsandbytes 0.50 dequantises rows that are no whole number of blocks wrongly on some CPUs.
    source = tiny_folder(
        tmp_path / "dense", architecture, hidden_size=128, intermediate_size=128, tie_word_embeddings=tied
    )
    model = load_model(source, "nf4", double_quant=double_quant)
    folder = tmp_path / "nf4"
    save_model(model, folder, source, dtype=torch.float32, max_shard_bytes=100_000, bitsandbytes=True)
    again = load_model(folder, "nf4", double_quant=not double_quant)  # what is quantised stays as it was
    expected = dict(model.named_parameters())
    assert dict(again.named_parameters()).keys() == expected.keys()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert told["bnb_4bit_use_double_quant"] is double_quant
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    assert theirs.config.quantization_config.load_in_4bit
    assert theirs.model.layers[0].mlp.up_proj.weight.quant_state.nested is double_quant
    # With gradients on: without, bitsandbytes takes a CPU path of its own in lower precision.
    torch.testing.assert_close(
        logits(model)[:9], theirs(BATCH.tokens[None, :9]).logits[0].detach(), rtol=1e-4, atol=1e-4
    )


def test_what_is_not_in_four_bits_is_not_written_as_such(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not in 4 bits: load it with model\.storage=nf4"):
        save_model(load_model(original, "bf16"), tmp_path / "saved", original, bitsandbytes=True)
    model = load_model(original, "nf4")
    add_adapter(model, "a", AdapterSpec(rank=2))
    with pytest.raises(ValueError, match="the adapter a cannot be merged into 4 bits"):
        save_model(model, tmp_path / "saved", original, adapter="a", bitsandbytes=True)
    assert not (tmp_path / "saved").exists()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on and still alive, and the most there ever were."""

    def __enter__(self) -> "LiveBytes":
        super().__enter__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("storage", ["full", "bf16", "nf4"])
def test_loading_holds_a_full_precision_tensor_or_a_block_besides(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path, hidden_size=128, intermediate_size=512)
    largest = max(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    view_of_file = WeightFiles.tensor

    def uncounted(self: Any, name: str) -> torch.Tensor:
        with _disable_current_modes():
            return view_of_file(self, name)

    monkeypatch.setattr(WeightFiles, "tensor", uncounted)
    monkeypatch.setattr("burnish.ops.nf4._SLICE", 32)  # quantisation works slice by slice, here of 8 KiB
    with LiveBytes() as live:
        model = load_model(folder, storage)
    held = sum(parameter.nbytes for parameter in model.parameters())
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    gaps = 256 * len(list(model.model.layers.parameters()))
    assert held <= live.now <= held + gaps + 4096  # besides small tables that are kept
    assert live.peak <= held + gaps + max(largest, block) + 65536
