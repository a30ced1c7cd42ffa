"""Where a recipe starts: the base's folder, and what an earlier recipe left on it. Imports no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from burnish.config import build, missing
from burnish.data.tokenizer import read_json
from burnish.engine.trained import tell_storage
from burnish.model.adapter_config import read_about
from burnish.model.families import find_model
from burnish.settings import TRAINED_STORAGES, TrainingSettings

C = TypeVar("C", bound=TrainingSettings)


@dataclass(frozen=True, slots=True)
class Start:
    """The folders that training starts from."""

    base: Path
    adapter: Path | None = None
    """An adapter that training goes on from; its state at the start is the reference of preference learning."""

    @property
    def words(self) -> Path:
        """Where the tokenizer and the chat template are that the model was last trained with."""
        return self.adapter if self.adapter and (self.adapter / "tokenizer.json").exists() else self.base


def begin(config: C) -> tuple[C, Start]:
    """The settings with what `from` decides filled in, and the folders to start from.

    From a run that trained an adapter: its base, stored as it was, and an adapter of the same shape. From a run that
    trained all weights, or a model folder: that model as the base. Raises ValueError where there is neither, and for
    settings that contradict what is stored.
    """
    if config.from_ is None:
        return config, Start(find_model(config.model.path, config.model.revision))
    folder = Path(config.from_)
    for model in (folder / "model", folder):
        if (model / "config.json").exists():
            return _from_model(config, model)
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter_config.json").exists():
            return _from_adapter(config, adapter)
    if (folder / "config.yaml").exists():
        raise ValueError(f"from={folder} is a run that has not finished: resume it first with save.resume=true")
    if not folder.exists():
        raise ValueError(f"from: {missing('folder', folder)}")
    raise ValueError(f"from={folder} holds neither a model nor an adapter: name the folder of a finished run")


def _from_model(config: C, model: Path) -> tuple[C, Start]:
    if "path" in config.model.model_fields_set and Path(config.model.path) != model:
        raise ValueError(f"from={config.from_} is a model of its own: leave out model.path={config.model.path}")
    storage, kind = config.model.storage, config.adapter.kind
    if storage == "auto":
        storage = "full" if kind == "none" else "bf16"
    if kind == "auto":
        kind = "none" if storage in TRAINED_STORAGES else "lora"
    return _settled(config, {"path": str(model), "storage": storage}, {"kind": kind}), Start(model)


def _from_adapter(config: C, adapter: Path) -> tuple[C, Start]:
    stored = read_json(adapter / "adapter_config.json")
    about = read_about(adapter)
    if about.get("kind", "policy") != "policy":
        raise ValueError(
            f"from={config.from_} is a {about['kind']} model, which writes no text: name the run before it"
        )
    own = _adapter_settings(stored)
    for name, value in own.items():
        given = getattr(config.adapter, name)
        if name in config.adapter.model_fields_set and given not in (value, "auto"):
            raise ValueError(
                f"adapter.{name}={given}, but the adapter of from={config.from_} has {value}: leave adapter.{name} out"
            )
    if config.model.storage in TRAINED_STORAGES or config.adapter.kind == "none":
        raise ValueError(
            f"from={config.from_} is an adapter on a frozen base; for full weights merge it first "
            "(`burnish merge`), and write from=DIR of the merged model"
        )
    model: dict[str, Any] = {"storage": config.model.storage, "double_quant": about.get("double_quant", True)}
    if model["storage"] == "auto":
        model["storage"] = about.get("storage", "bf16")
    if "path" not in config.model.model_fields_set:
        model |= {"path": stored.get("base_model_name_or_path"), "revision": stored.get("revision")}
        if not model["path"]:
            raise ValueError(f"the adapter of from={config.from_} does not name its base: write model.path=DIR_OR_ID")
    settled = _settled(config, model, own)
    base = find_model(settled.model.path, settled.model.revision)
    if os.environ.get("RANK", "0") == "0":
        tell_storage(adapter, base, settled.model.storage)
    return settled, Start(base, adapter)


def _adapter_settings(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of an adapter in PEFT's words; its layers are read from the file with its weights."""
    if stored.get("peft_type") == "IA3":
        return {"kind": "ia3"}
    kind = "dora" if stored.get("use_dora") else "lora"
    return {
        "kind": kind,
        "rank": stored["r"],
        "alpha": float(stored["lora_alpha"]),
        "rslora": bool(stored.get("use_rslora", False)),
    }


def _settled(config: C, model: dict[str, Any], adapter: dict[str, Any]) -> C:
    tree = config.model_dump(by_alias=True)
    return build(type(config), tree | {"model": tree["model"] | model, "adapter": tree["adapter"] | adapter})
