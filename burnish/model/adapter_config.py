"""What lies beside an adapter's weights: PEFT's `adapter_config.json`, read strictly, and our `burnish.json`.

Imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

CONFIG_FILE = "adapter_config.json"
ABOUT_FILE = "burnish.json"
SCORE = "score"
"""What Hugging Face calls the head of a model that scores."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says. Raises ValueError where it is missing, damaged or asks for what we do not do."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is no adapter: there is no {CONFIG_FILE} in it")
    config = _read_object(file)
    kind = config.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise ValueError(f"{file}: peft_type is {kind}; LORA (with DoRA) and IA3 can be read")
    for key, value in config.items():
        if key == "init_lora_weights" and value not in _INITS_THAT_LEAVE_THE_BASE_ALONE:
            raise ValueError(
                f"{file}: init_lora_weights={value} changes the base weights: convert it to a plain LoRA with PEFT "
                "(save_pretrained with path_initial_model_for_weight_conversion)"
            )
        if key == "modules_to_save" and isinstance(value, list) and set(cast(list[str], value)) <= _PEFT_HEADS:
            continue
        if key not in _UNDERSTOOD and value not in _NEUTRAL:
            raise ValueError(f"{file}: {key}={value} is not supported")
    if not isinstance(config.get("target_modules"), list | str):
        raise ValueError(f"{file}: target_modules must be a list of names or a regular expression")
    for key, lowest in (("r", 1), ("lora_alpha", 0), ("lora_dropout", 0)):
        value = config.get(key, 1)
        if not isinstance(value, int | float) or value < lowest or (key == "r" and value != int(value)):
            raise ValueError(f"{file}: {key}={value} must be a number, at least {lowest}")
    return config


def read_about(folder: Path) -> dict[str, Any]:
    """What was said of an adapter when it was saved, as `save_adapter` was given it; empty where nothing was.

    Raises ValueError for a file that is damaged.
    """
    file = folder / ABOUT_FILE
    return _read_object(file) if file.is_file() else {}


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether a PEFT config is that of an adapter with a head of its own, as reward and value models have."""
    return config.get("task_type") == "SEQ_CLS" or SCORE in (config.get("modules_to_save") or ())


def check_kind(folder: Path, config: Mapping[str, Any], wants_head: bool) -> None:
    """Raises ValueError for an adapter that scores where one that writes is wanted, and the other way round."""
    if has_head(config) and not wants_head:
        kind = read_about(folder).get("kind", "reward")
        raise ValueError(f"{folder} is the adapter of a {kind} model, which gives numbers and writes no text")
    if wants_head and not has_head(config):
        raise ValueError(
            f"{folder} is the adapter of a language model, without a head that scores: name a run of `burnish reward`"
        )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return cast(dict[str, Any], found)


_PEFT_HEADS = {SCORE, "classifier"}
"""What PEFT saves beside the layers of an adapter for sequence classification: whichever of the two there is."""

_UNDERSTOOD = {
    *("alpha_pattern", "lora_alpha", "lora_dropout", "r", "rank_pattern", "use_dora", "use_rslora"),
    *("feedforward_modules", "init_ia3_weights", "init_lora_weights", "peft_type", "target_modules"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("megatron_core", "qalora_group_size"),
}
"""Options that are read, or that say nothing about what the adapter computes."""

_NEUTRAL: tuple[Any, ...] = (None, False, "none", {}, [])
"""Values by which an option that is not supported says that it is off."""

_INITS_THAT_LEAVE_THE_BASE_ALONE: tuple[Any, ...] = (True, False, None, "gaussian", "eva", "orthogonal")
