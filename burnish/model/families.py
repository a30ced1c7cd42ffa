"""The model families: what a checkpoint's own `config.json` says, read into one `DecoderConfig`.

There is no table of model sizes here, only the names each family gives to things and the rules it follows.
Importing this file does not import torch, so that a wrong path or an unknown architecture is an error at once.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from burnish.config import missing
from burnish.model.ropes import Rope, head_dim_of, rope_of

EMBEDDED = Path(__file__).parent.parent / "assets" / "base"
"""The base model that ships with the package: `model.path=embedded`."""

Config = dict[str, Any]
"""The content of a `config.json`."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from one decoder block to the next."""

    window: int | None
    """Position t sees the keys t - window + 1 ... t; None: all before it."""
    rope: int | None
    """Which of `DecoderConfig.ropes` turns its queries and keys; None: no rotation."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything about a decoder that its weights do not say."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    tied: bool
    activation: Literal["silu", "gelu_tanh"]
    attention_scale: float
    ropes: tuple[Rope, ...]
    layers: tuple[LayerConfig, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    """q, k and v are one matrix `qkv_proj`, gate and up one matrix `gate_up_proj` (Phi-3)."""
    pre_norm: bool = True
    """Norms on what goes into attention and MLP."""
    post_norm: bool = False
    """Norms on what comes out of them, before it is added to the stream."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norms of queries and keys: of each head, or of all heads as one vector."""
    norm_offset: float = 0.0
    """Norms multiply by (offset + weight); Gemma stores its norm weights around 0."""
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    initializer_range: float = 0.02
    scores: bool = False
    """A reward model: `score`, one number wide, is stored in place of a language model's head."""


def find_model(path: str, revision: str | None = None) -> Path:
    """The folder of a model: `embedded`, a folder in Hugging Face layout, or a hub id, which is downloaded.

    Raises ValueError where there is no such folder and no such repository.
    """
    folder = EMBEDDED if path == "embedded" else Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise ValueError(f"model.path: {folder} holds no config.json; give a folder in Hugging Face layout")
    if path == "embedded" or path.count("/") != 1 or path.startswith((".", "/", "~")):
        told = missing("folder", folder)
        more = "" if told.endswith("?") else "; give a folder, a hub id (owner/name) or `embedded`"
        raise ValueError(f"model.path: {told}{more}")
    return _download(path, revision)


def read_json(folder: Path) -> Config:
    """The content of `config.json`. Raises ValueError if it is missing or no JSON object."""
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such file; model.path must be a folder in Hugging Face layout") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: must be a JSON object, not {type(raw).__name__}")
    return raw


def read_config(folder: Path, scores: bool = False) -> DecoderConfig:
    """The decoder that `config.json` describes, of a model that writes or, with `scores`, of a reward model.

    Raises ValueError naming what is unknown, missing or unsupported, and for a model of the other kind.
    """
    return parse_config(read_json(folder), str(folder / "config.json"), scores)


def parse_config(raw: Config, place: str = "config.json", scores: bool = False) -> DecoderConfig:
    """The decoder that the content of a `config.json` describes; `place` begins every error message."""
    known = ", ".join(sorted(FAMILIES))
    names: list[str] = raw.get("architectures") or []
    if not names:
        raise ValueError(f"{place}: `architectures` is missing; write one of {known}")
    if names[0].endswith(_SCORING) != scores:
        kinds = ("gives scores and writes no text", "writes text and has no head that scores")
        raise ValueError(f"{place}: a {names[0]} {kinds[scores]}")
    if scores:
        return _parse_scoring(raw, place)
    if names[0] not in FAMILIES:
        raise ValueError(f"{place}: architecture {names[0]} is not known; known are {known}")
    quantized: Config = raw.get("quantization_config") or {}
    if quantized and not (quantized.get("quant_method") == "bitsandbytes" and quantized.get("load_in_4bit")):
        method = quantized.get("quant_method", "unknown")
        raise ValueError(f"{place}: weights quantized by {method} cannot be read; give 16-bit or bitsandbytes NF4 ones")
    try:
        config = FAMILIES[names[0]](raw)
    except KeyError as error:
        raise ValueError(f"{place}: {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return config


def scoring_name(architecture: str) -> str:
    """What `transformers` calls the model for sequence classification beside a model that writes."""
    gemma = {"Gemma3ForCausalLM": "Gemma3Text", "Gemma3ForConditionalGeneration": "Gemma3Text"}
    return gemma.get(architecture, architecture.removesuffix("ForCausalLM")) + _SCORING


def text_config(raw: Config) -> Config:
    """The `config.json` of the language model alone: of a model that also sees, its `text_config`."""
    if "text_config" not in raw:
        return raw
    kept = {key: raw[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id", "dtype") if key in raw}
    return {**kept, **raw["text_config"], "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


def _parse_scoring(raw: Config, place: str) -> DecoderConfig:
    """The decoder of a reward model: its family's, whose head nobody asks for and the files do not have."""
    name = raw["architectures"][0]
    writer = next((family for family in FAMILIES if scoring_name(family) == name), name)
    labels = len(raw["id2label"]) if raw.get("id2label") else int(raw.get("num_labels", 2))  # their default is 2
    if labels != 1:
        raise ValueError(f"{place}: a reward model gives one number, this {name} has {labels} labels")
    config = parse_config({**raw, "architectures": [writer]}, place)
    return replace(config, architecture=name, tied=True, scores=True)


def _llama(raw: Config) -> DecoderConfig:
    bias = bool(raw.get("attention_bias", False))
    return _decoder(raw, qkv_bias=bias, output_bias=bias, mlp_bias=bool(raw.get("mlp_bias", False)))


def _mistral(raw: Config) -> DecoderConfig:
    raw = {"sliding_window": 4096, "num_key_value_heads": 8, **raw}
    return _decoder(raw, windows=[raw["sliding_window"]] * int(raw["num_hidden_layers"]))


def _qwen2(raw: Config) -> DecoderConfig:
    return _decoder(raw, windows=_qwen_windows(raw), qkv_bias=True)


def _qwen3(raw: Config) -> DecoderConfig:
    raw = {"head_dim": 128, **raw}
    bias = bool(raw.get("attention_bias", False))
    return _decoder(raw, windows=_qwen_windows(raw), qkv_bias=bias, output_bias=bias, qk_norm="head")


def _gemma(raw: Config, **rules: Any) -> DecoderConfig:
    if raw.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention: an encoder cannot be trained to write; give a causal Gemma")
    # The first Gemma checkpoints say `gelu` and mean its tanh approximation, which is what they were trained with.
    raw = {"tie_word_embeddings": True, "head_dim": 256, **raw, "hidden_act": "gelu_pytorch_tanh"}
    bias = bool(raw.get("attention_bias", False))
    scale = math.sqrt(raw["hidden_size"])
    return _decoder(raw, qkv_bias=bias, output_bias=bias, norm_offset=1.0, embedding_scale=scale, **rules)


def _gemma2(raw: Config) -> DecoderConfig:
    raw = {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **raw}
    return _gemma(raw, windows=_patterned_windows(raw, period=2), **_gemma2_rules(raw))


def _gemma3(raw: Config) -> DecoderConfig:
    # Published configs leave out whatever equals the family's defaults; these are the ones that matter.
    defaults = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096}
    raw = {**defaults, "max_position_embeddings": 131072, "sliding_window_pattern": 6, **raw}
    given: Config = raw.get("rope_parameters") or {
        "full_attention": {"rope_theta": raw.get("rope_theta", 1e6), **(raw.get("rope_scaling") or {})},
        "sliding_attention": {"rope_theta": raw.get("rope_local_base_freq", 1e4)},
    }
    ropes = tuple(
        rope_of({**raw, "head_dim": raw.get("head_dim", 256), "rope_parameters": given[kind]})
        for kind in ("full_attention", "sliding_attention")
    )
    windows = _patterned_windows(raw, period=raw["sliding_window_pattern"])
    uses = [0 if window is None else 1 for window in windows]
    return _gemma(raw, windows=windows, ropes=ropes, uses=uses, qk_norm="head", **_gemma2_rules(raw))


def _gemma3_with_vision(raw: Config) -> DecoderConfig:
    return _gemma3(text_config(raw))


def _phi3(raw: Config) -> DecoderConfig:
    return _decoder(raw, windows=[raw.get("sliding_window")] * int(raw["num_hidden_layers"]), fused=True)


def _smollm3(raw: Config) -> DecoderConfig:
    raw = {"tie_word_embeddings": True, "rope_theta": 2e6, "num_key_value_heads": 4, **raw}
    num_layers, interval = int(raw["num_hidden_layers"]), int(raw.get("no_rope_layer_interval", 4))
    rotated = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]
    kinds = raw.get("layer_types") or ["full_attention" if turn else "sliding_attention" for turn in rotated]
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    bias = bool(raw.get("attention_bias", False))
    return _decoder(
        raw,
        windows=[window if kind == "sliding_attention" else None for kind in kinds],
        uses=[0 if turn else None for turn in rotated],
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _olmo2(raw: Config) -> DecoderConfig:
    bias = bool(raw.get("attention_bias", False))
    return _decoder(
        {"rms_norm_eps": 1e-5, **raw}, qkv_bias=bias, output_bias=bias, pre_norm=False, post_norm=True, qk_norm="full"
    )


def _decoder(
    raw: Config,
    windows: Sequence[int | None] | None = None,
    ropes: tuple[Rope, ...] | None = None,
    uses: Sequence[int | None] | None = None,
    **rules: Any,
) -> DecoderConfig:
    """What all families share. `windows` and `uses` (the rope of each layer) have an entry per layer."""
    hidden, heads, num_layers = (int(raw[key]) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = int(raw.get("num_key_value_heads") or heads)
    head_dim = head_dim_of(raw)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    activation = raw.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {activation} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    windows = [None] * num_layers if windows is None else windows
    uses = [0] * num_layers if uses is None else uses
    if min(len(windows), len(uses)) < num_layers:
        raise ValueError(f"layer_types or no_rope_layers has fewer entries than the {num_layers} layers")
    layers = tuple(LayerConfig(window, use) for window, use, _ in zip(windows, uses, range(num_layers), strict=False))
    return DecoderConfig(
        architecture=raw["architectures"][0],
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=int(raw.get("max_position_embeddings", 2048)),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        activation=_ACTIVATIONS[activation],
        attention_scale=rules.pop("attention_scale", head_dim**-0.5),
        ropes=(rope_of(raw),) if ropes is None else ropes,
        layers=layers,
        initializer_range=float(raw.get("initializer_range", 0.02)),
        **rules,
    )


def _gemma2_rules(raw: Config) -> dict[str, Any]:
    return {
        "attention_scale": float(raw.get("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_softcap": raw.get("attn_logit_softcapping"),
        "final_softcap": raw.get("final_logit_softcapping"),
        "post_norm": True,
    }


def _qwen_windows(raw: Config) -> list[int | None]:
    num_layers = int(raw["num_hidden_layers"])
    if not raw.get("use_sliding_window", False):
        return [None] * num_layers
    full, window = raw.get("max_window_layers", 28), raw.get("sliding_window", 4096)
    kinds = raw.get("layer_types") or ["full" if i < full else "sliding_attention" for i in range(num_layers)]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _patterned_windows(raw: Config, period: int) -> list[int | None]:
    """Every `period`-th layer sees everything, the others a window, unless `layer_types` says otherwise."""
    kinds = raw.get("layer_types") or [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(int(raw["num_hidden_layers"]))
    ]
    return [raw["sliding_window"] if kind == "sliding_attention" else None for kind in kinds]


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        told = f"{name} is no folder, and the hub did not give it: {reason}"
        if Path(name).parent.is_dir():  # more likely a path with a mistake in it than somebody's name on the hub
            told = f"{missing('folder', Path(name))} (nor did the hub give it: {reason})"
        raise ValueError(f"model.path: {told}") from None


_SCORING = "ForSequenceClassification"

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

FAMILIES: dict[str, Callable[[Config], DecoderConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3_with_vision,
    "Phi3ForCausalLM": _phi3,
    "SmolLM3ForCausalLM": _smollm3,
    "Olmo2ForCausalLM": _olmo2,
}
