import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.model import families
from burnish.model.families import FAMILIES, LayerConfig, find_model, parse_config, read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def config_file(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import sys; import burnish.model.families; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_shortest_llama_config_has_the_old_defaults(tmp_path: Path) -> None:
    config = read_config(config_file(tmp_path))
    assert (config.num_kv_heads, config.head_dim, config.tied, config.attention_scale) == (4, 16, False, 0.25)
    assert config.layers == (LayerConfig(None, 0),) * 3
    assert config.ropes[0].frequencies[:2] == (1.0, pytest.approx(10000 ** (-2 / 16)))


SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_both_ways_to_write_a_rope_are_one(kind: str) -> None:
    new = {**LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **SCALED}}
    old = {**LLAMA, "rope_theta": 500.0, "rope_scaling": {"rope_type": kind, **SCALED}}
    oldest = {**LLAMA, "rope_theta": 500.0, "rope_scaling": {"type": kind, **SCALED}}
    assert parse_config(new).ropes == parse_config(old).ropes == parse_config(oldest).ropes
    assert parse_config(new).ropes != parse_config({**LLAMA, "rope_theta": 500.0}).ropes


def test_a_published_gemma_3_config_is_read_by_the_familys_defaults() -> None:
    # What google/gemma-3-4b-it says of its text model, and no more.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = parse_config({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert config.tied
    assert [layer.window for layer in config.layers[:7]] == [1024] * 5 + [None, 1024]
    assert [layer.rope for layer in config.layers[:7]] == [1] * 5 + [0, 1]
    full, local = config.ropes
    assert full.frequencies[1] == pytest.approx(1e6 ** (-2 / 256) / 8)
    assert local.frequencies[1] == pytest.approx(1e4 ** (-2 / 256))


def test_qwen_has_windows_only_where_it_says_so() -> None:
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert {layer.window for layer in parse_config(qwen).layers} == {None}
    windowed = parse_config({**qwen, "use_sliding_window": True})
    assert [layer.window for layer in windowed.layers] == [None, 8, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not known; known are Gemma2ForC"),
        ({"architectures": None}, "`architectures` is missing; write one of"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_act": "relu"}, "hidden_act relu is not supported; supported are silu, gelu_pytorch_tanh"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type dynamic is not supported for LlamaForCausalLM; supported are default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor' is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights quantized by gptq cannot be read"),
        ({"architectures": ["GemmaForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": ["a"]}, "fewer entries"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = config_file(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: ") as error:
        read_config(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    raw = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="'hidden_size' is missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[1]", "must be a JSON object, not list")])
def test_a_damaged_config_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_models_are_found_by_folder(tmp_path: Path) -> None:
    assert find_model(str(config_file(tmp_path))) == tmp_path
    with pytest.raises(ValueError, match=r"there is no folder .*/nowhere; give a folder, a hub id"):
        find_model(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no config.json"):
        find_model(str(tmp_path / "empty"))


def test_a_hub_id_that_the_hub_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: Any) -> str:
        raise OSError("cannot reach the hub\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"^model.path: some/model is no folder.*: cannot reach the hub$"):
        find_model("some/model")


def test_embedded_is_in_the_package() -> None:
    assert families.EMBEDDED.parent.name == "assets"
    assert (families.EMBEDDED.parent.parent / "types.py").is_file()


def test_every_family_is_named_as_transformers_names_it() -> None:
    import transformers

    assert all(hasattr(transformers, name) for name in FAMILIES)
