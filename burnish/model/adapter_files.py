"""Adapters as PEFT folders: written so that PEFT and vLLM load them as they are, and read strictly.

The layout is PEFT's: `adapter_model.safetensors` with `base_model.model.<layer>.lora_A.weight` and the like, and
`adapter_config.json`; tokenizer and chat template lie beside them. An adapter with a scalar head, of a reward or value
model, is PEFT's adapter for sequence classification with one label, and its head the tensor `score.weight`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish.files import written_aside
from burnish.model.adapter_config import ABOUT_FILE, CONFIG_FILE, SCORE, check_kind, read_adapter_config
from burnish.model.adapters import (
    HEAD,
    IA3,
    Adapter,
    AdapterSpec,
    DoRA,
    LoRA,
    adapter_layers,
    add_adapter,
    linear_layers,
)
from burnish.model.checkpoint import copy_tokenizer
from burnish.model.heads import ScalarHead, add_head

WEIGHTS_FILE = "adapter_model.safetensors"


def save_adapter(
    model: nn.Module,
    name: str,
    folder: Path,
    base: str,
    tokenizer_folder: Path | None = None,
    about: Mapping[str, object] | None = None,
    revision: str | None = None,
    head: str | None = None,
) -> None:
    """Write the adapter called `name` as a PEFT folder, whole or not at all.

    `base` is the model it was trained on, a hub id or a path, and `revision` which commit or branch of it. `about` is
    what `read_about` gives back; PEFT passes it over. `head` names the scalar head that belongs to the adapter; a bias
    of 0, which is all that PEFT knows, is not written. Raises ValueError for a folder that holds anything else than an
    adapter: it is replaced as a whole.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} holds something else than an adapter: choose another folder")
    layers = adapter_layers(model, name)
    if head is not None:  # a classifier has no language model's head to be adapted
        layers = {path: adapter for path, adapter in layers.items() if path != HEAD}
    config, tensors = to_peft(layers, list(linear_layers(model)), base)
    config["revision"] = revision
    if head is not None:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        tensors |= _head_tensors(cast(ScalarHead, cast(nn.ModuleDict, model.heads)[head]))
    documents = {CONFIG_FILE: config} | ({} if about is None else {ABOUT_FILE: dict(about)})
    with written_aside(folder) as aside:
        try:
            save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS_FILE} could not be written ({error})") from None
        for file, document in documents.items():
            (aside / file).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, aside)


def load_adapter(
    model: nn.Module,
    folder: Path,
    name: str,
    trainable: bool = False,
    base: str | None = None,
    head: str | None = None,
) -> AdapterSpec:
    """Add the adapter in a PEFT folder to the model under `name`; its spec, with the layers in full.

    `head` is what to call the scalar head that the adapter must then have; without, it must have none. Raises
    ValueError, and leaves the model as it was, for what `read_adapter` refuses.
    """
    layers = linear_layers(model)
    width = cast(int, cast(Any, model.config).hidden_size) if head is not None else None
    assert head is None or head not in cast(nn.ModuleDict, model.heads)
    spec, parts = read_adapter(folder, {path: layer.shape for path, layer in layers.items()}, base, width)
    # A generator of its own: what is drawn here is overwritten at once, and must not move the run's random state.
    add_adapter(model, name, spec, torch.Generator())
    for path, adapter in adapter_layers(model, name).items():
        fill_adapter(adapter, parts[path], trainable)
    if head is not None and width is not None:
        _fill_head(add_head(model, head, width, torch.Generator()), parts[SCORE], trainable)
    return spec


def read_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], base: str | None = None, width: int | None = None
) -> tuple[AdapterSpec, dict[str, dict[str, Tensor]]]:
    """What a PEFT folder holds for a model whose linear layers have these shapes: the spec, and each layer's tensors.

    With `width`, the size of hidden states, the adapter must have a scalar head, whose tensors are under SCORE; without
    it must have none. Raises ValueError for an option that is not supported, and for a tensor that is missing,
    unexpected, misshapen or not finite; where `base` is given, for an adapter of a model of another name too.
    """
    config = read_adapter_config(folder)
    check_kind(folder, config, width is not None)
    trained_on = config.get("base_model_name_or_path") or "a base that it does not name"
    if base is not None and config.get("base_model_name_or_path") and _last(trained_on) != _last(base):
        raise ValueError(f"{folder} is an adapter of {trained_on}, not of {base}: give the model it was trained on")
    spec = spec_from_peft(config, list(shapes), folder / CONFIG_FILE)
    wanted = {path: _shapes(spec, path, shapes[path]) for path in spec.targets}
    flat = {f"{_PREFIX}{path}.{key}": shape for path, keys in wanted.items() for key, shape in keys.items()}
    optional: dict[str, tuple[int, ...]] = {}
    if width is not None:
        wanted[SCORE] = {"weight": (1, width)}
        flat[_SCORE_WEIGHT], optional[_SCORE_BIAS] = (1, width), (1,)
    found = _read_tensors(folder / WEIGHTS_FILE, flat, trained_on, optional)
    parts = {path: {key: found[f"{_PREFIX}{path}.{key}"] for key in keys} for path, keys in wanted.items()}
    if _SCORE_BIAS in found:
        parts[SCORE]["bias"] = found[_SCORE_BIAS]
    return spec, parts


def fill_adapter(adapter: Adapter, parts: Mapping[str, Tensor], trainable: bool = False) -> None:
    """Give an adapter's part in one layer the values that `read_adapter` found for it."""
    for key, attribute in _TENSORS[adapter.kind].items():
        parameter = adapter.get_parameter(attribute)
        parameter.data.copy_(parts[key].reshape(parameter.shape))
        parameter.requires_grad_(trainable)


def to_peft(
    layers: Mapping[str, Adapter], all_layers: list[str], base: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter as PEFT's (config, tensors), without its name in either."""
    kind = next(iter(layers.values())).kind
    targets = _short_names(list(layers), all_layers)
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    factors = dict.fromkeys(layers, 1.0)
    if kind == "ia3":
        inward = [path for path, adapter in layers.items() if isinstance(adapter, IA3) and adapter.on_input]
        feedforward = _short_names(inward, all_layers)
        if not set(feedforward) <= set(targets):  # PEFT refuses a config where it is no subset
            feedforward, config["target_modules"] = sorted(inward), sorted(layers)
        config |= {"peft_type": "IA3", "feedforward_modules": feedforward, "init_ia3_weights": True}
    else:
        updates = {path: adapter.lora if isinstance(adapter, DoRA) else adapter for path, adapter in layers.items()}
        low_rank, factors = _low_rank_config(cast(dict[str, LoRA], updates))
        config |= low_rank | {"use_dora": kind == "dora"}
    tensors: dict[str, Tensor] = {}
    for path, adapter in layers.items():
        for key, attribute in _TENSORS[kind].items():
            tensor = adapter.get_parameter(attribute).detach().cpu()
            if key == "lora_B.weight":
                tensor = tensor * factors[path]
            tensors[f"{_PREFIX}{path}.{key}"] = tensor.reshape(_file_shape(adapter, tensor)).contiguous()
    return config, tensors


def spec_from_peft(config: Mapping[str, Any], all_layers: list[str], file: Path) -> AdapterSpec:
    """The spec that a PEFT config describes, with its target layers in full.

    A name of `target_modules` that this model has no layer of is passed over, as PEFT does: whether every tensor finds
    its layer is checked on the tensors.
    """
    targets = _layers_of(config["target_modules"], all_layers)
    if not targets:
        raise ValueError(f"{file}: target_modules={config['target_modules']} names no layer that can carry an adapter")
    if config["peft_type"] == "IA3":
        # PEFT takes endings here without regard to dots; the difference shows in no model that we read.
        inward = _layers_of(config.get("feedforward_modules") or [], targets)
        return AdapterSpec(kind="ia3", targets=tuple(targets), feedforward=tuple(inward))
    spec = AdapterSpec(
        kind="dora" if config.get("use_dora") else "lora",
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        rslora=bool(config.get("use_rslora")),
        dropout=config.get("lora_dropout", 0.0),
        targets=tuple(targets),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )
    ranks = {path: spec.rank_of(path) for path in targets if spec.rank_of(path) != spec.rank}
    alphas = {path: spec.alpha_of(path) for path in targets if spec.alpha_of(path) != spec.alpha}
    return replace(spec, rank_pattern=ranks, alpha_pattern=alphas)


def _head_tensors(head: ScalarHead) -> dict[str, Tensor]:
    tensors = {_SCORE_WEIGHT: head.weight.detach().cpu().contiguous()}
    return tensors | ({_SCORE_BIAS: head.bias.detach().cpu()} if bool(head.bias) else {})


def _fill_head(head: ScalarHead, parts: Mapping[str, Tensor], trainable: bool) -> None:
    """Give a head the values that `read_adapter` found for it; a bias that is not there is 0."""
    for key, parameter in head.named_parameters():
        parameter.data.copy_(parts[key] if key in parts else torch.zeros_like(parameter))
        parameter.requires_grad_(trainable)


def _low_rank_config(layers: Mapping[str, LoRA]) -> tuple[dict[str, Any], dict[str, float]]:
    """The part of the config about ranks and scales, and what each layer's B is multiplied by in the file.

    vLLM knows one scale for all layers, that of `r` and `lora_alpha`, and reads no patterns; PEFT knows a rank and an
    alpha per layer. So every layer is written with the one scale (its alpha follows its rank), and where its own
    differs, the ratio goes into B. `r` is the largest rank, which is what vLLM reserves room for.
    """
    first = max(layers.values(), key=lambda adapter: adapter.rank)
    ranks = {path: adapter.rank for path, adapter in layers.items() if adapter.rank != first.rank}
    alphas = {path: first.scale * (math.sqrt(rank) if first.rslora else rank) for path, rank in ranks.items()}
    config = {
        "alpha_pattern": {path: _plain(alpha) for path, alpha in alphas.items()},
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": _plain(first.alpha),
        "lora_dropout": first.dropout,
        "peft_type": "LORA",
        "r": first.rank,
        "rank_pattern": ranks,
        "use_rslora": first.rslora,
    }
    return config, {path: adapter.scale / first.scale for path, adapter in layers.items()}


def _plain(number: float) -> float | int:
    """The number, whole where it is: PEFT declares lora_alpha an integer."""
    return int(number) if number == int(number) else number


def _file_shape(adapter: Adapter, tensor: Tensor) -> tuple[int, ...]:
    """PEFT keeps IA³'s factors as the row or the column that they multiply the weight by."""
    if isinstance(adapter, IA3):
        return (1, tensor.numel()) if adapter.on_input else (tensor.numel(), 1)
    return tuple(tensor.shape)


def _shapes(spec: AdapterSpec, path: str, layer: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """What tensors a file must hold for a layer of this shape, after the layer's name."""
    outputs, inputs = layer
    if spec.kind == "ia3":
        return {"ia3_l": (1, inputs) if path in spec.feedforward else (outputs, 1)}
    rank = spec.rank_of(path)
    shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}
    return shapes | ({"lora_magnitude_vector": (outputs,)} if spec.kind == "dora" else {})


def _read_tensors(
    file: Path,
    wanted: Mapping[str, tuple[int, ...]],
    trained_on: str,
    optional: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """The tensors of a file that must hold these, may hold the optional ones, and no others.

    Raises ValueError naming the first that is wrong.
    """
    if not file.is_file():
        pickled = file.with_suffix(".bin").is_file()
        hint = " (adapter_model.bin is not read: it can hold code; save it again as safetensors)" if pickled else ""
        raise ValueError(f"{file} is missing{hint}")
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    wrong = {
        "lacks": wanted.keys() - found.keys(),
        "has the unexpected": found.keys() - wanted.keys() - optional.keys(),
    }
    for verb, keys in wrong.items():
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{file} {verb} {min(keys)}{more}: it is damaged, or an adapter of another base")
    for key, shape in {**wanted, **{key: shape for key, shape in optional.items() if key in found}}.items():
        if tuple(found[key].shape) != shape:
            given = tuple(found[key].shape)
            raise ValueError(f"{file}: {key} is {given}, this model's is {shape}: it was trained on {trained_on}")
        if not bool(found[key].isfinite().all()):
            raise ValueError(f"{file}: {key} holds NaN or infinity")
    return found


def _short_names(layers: list[str], all_layers: list[str]) -> list[str]:
    """The layers by their endings, where an ending means all layers that have it, else by their whole names."""
    by_ending: dict[str, list[str]] = {}
    for path in layers:
        by_ending.setdefault(_last(path, "."), []).append(path)
    names: list[str] = []
    for ending, paths in by_ending.items():
        whole = len(paths) == sum(_last(path, ".") == ending for path in all_layers)
        names += [ending] if whole else paths
    return sorted(names)


def _layers_of(names: str | list[str], layers: Iterable[str]) -> list[str]:
    """The layers that PEFT would take a `target_modules` for: all of them, a regular expression, or endings."""
    if isinstance(names, str):
        if names.lower() == "all-linear":
            return [path for path in layers if path != HEAD]
        return [path for path in layers if re.fullmatch(names, path)]
    return [path for path in layers if any(path == name or path.endswith(f".{name}") for name in names)]


def _last(path: str, separator: str = "/") -> str:
    return path.rstrip(separator).rsplit(separator, 1)[-1]


_PREFIX = "base_model.model."
_SCORE_WEIGHT, _SCORE_BIAS = f"{_PREFIX}{SCORE}.weight", f"{_PREFIX}{SCORE}.bias"

_TENSORS = {
    "lora": {"lora_A.weight": "A", "lora_B.weight": "B"},
    "dora": {"lora_A.weight": "lora.A", "lora_B.weight": "lora.B", "lora_magnitude_vector": "magnitude"},
    "ia3": {"ia3_l": "factors"},
}
"""What PEFT calls the parameters of each kind of adapter."""
