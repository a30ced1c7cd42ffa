"""Opening a model that has been trained: its base, its adapter, and the tokenizer and template that belong to it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from burnish.config import missing
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer, read_json
from burnish.engine.preflight import check_device
from burnish.model.adapter_config import read_about
from burnish.model.families import find_model, read_config
from burnish.settings import TrainedModelSettings

if TYPE_CHECKING:
    from burnish.model.decoder import Decoder

ADAPTER = "trained"


@dataclass(frozen=True, slots=True)
class Trained:
    """A model ready to be asked, and the name of its adapter (None: the weights themselves)."""

    decoder: "Decoder"
    adapter: str | None
    tokenizer: Tokenizer
    template: ChatTemplate


def find_adapter(path: str) -> Path:
    """The adapter folder that a path names: itself, or the `adapter` folder of a run. Raises ValueError."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / "adapter_config.json").exists():
            return folder
    if not Path(path).exists():
        raise ValueError(f"model.adapter: {missing('folder', Path(path))}")
    raise ValueError(
        f"model.adapter={path} holds no adapter_config.json; name an adapter folder, or the folder of a run that "
        "trained one"
    )


def find_base(settings: TrainedModelSettings) -> Path:
    """The model folder that the settings name: its own path, a run's `model` folder, or the base of the adapter."""
    path, revision = settings.path, settings.revision
    if path is None and settings.adapter is None:
        raise ValueError("write model.path=DIR_OR_ID, or model.adapter=DIR to use an adapter's own base")
    if path is None and settings.adapter is not None:
        config = read_json(find_adapter(settings.adapter) / "adapter_config.json")
        path, revision = config.get("base_model_name_or_path"), revision or config.get("revision")
        if not path:
            raise ValueError(
                f"model.adapter={settings.adapter} does not say which base it is for; write model.path=DIR_OR_ID"
            )
    assert path is not None
    if (Path(path) / "adapter").is_dir() and not (Path(path) / "model").is_dir():
        raise ValueError(f"model.path={path} is a run that trained an adapter; write model.adapter={path}")
    result = Path(path) / "model"
    return result if (result / "config.json").exists() else find_model(path, revision)


def check_trained(settings: TrainedModelSettings) -> None:
    """Raises ValueError for a device, base or adapter that is not there; imports no torch."""
    check_device(settings.device, "model.device")
    read_config(find_base(settings))
    if settings.adapter is not None:
        find_adapter(settings.adapter)


def check_base(adapter: Path, base: Path) -> None:
    """Raises ValueError when an adapter says that it was trained on another base than the one in this folder."""
    from burnish.model.checkpoint import base_fingerprint

    if read_about(adapter).get("base_fingerprint") not in (None, base_fingerprint(base)):
        raise ValueError(
            f"the adapter in {adapter} was trained on another base than the one in {base}; "
            "write model.path=DIR_OR_ID of the base it was trained on"
        )


def tell_storage(adapter: Path, base: Path, storage: str, setting: str = "model.storage") -> None:
    """Say in a line that an adapter was trained on NF4 weights and is used on others, or the other way round.

    `setting` decides over `storage`. PEFT's own folders do not say what they were trained on, so nothing is said of
    them; nor of a base whose files are NF4 themselves, since all storages keep its values.
    """
    trained = read_about(adapter).get("storage")
    alike = (trained == "nf4") == (storage == "nf4")
    if trained is None or alike or "quantization_config" in read_json(base / "config.json"):
        return
    if trained == "nf4":
        line = f"was trained on NF4 weights and is used on others, which it has not seen: {setting}=nf4 gives it those"
    else:
        line = (
            f"was not trained on NF4 weights, on which it is used: another {setting} than nf4 gives it what it has seen"
        )
    tqdm.write(f"the adapter in {adapter} {line}", file=sys.stderr)


def open_trained(settings: TrainedModelSettings) -> Trained:
    """The model, its tokenizer and its template, on the device, in evaluation mode; `check_trained` comes before."""
    import torch

    from burnish.engine.assemble import activation_dtype
    from burnish.engine.mesh import device_kind
    from burnish.model.adapter_files import load_adapter
    from burnish.model.checkpoint import load_model

    base = find_base(settings)
    folder = find_adapter(settings.adapter) if settings.adapter is not None else None
    about = read_about(folder) if folder else {}
    storage = about.get("storage", "bf16") if settings.storage == "auto" else settings.storage
    if folder:
        check_base(folder, base)
        tell_storage(folder, base, storage)
    device = torch.device(device_kind(settings.device))
    dtype, double_quant = activation_dtype(settings.dtype, device), about.get("double_quant", True)
    decoder = load_model(base, storage, device, dtype, double_quant).eval()
    adapter, words = None, base
    if folder:
        load_adapter(decoder, folder, adapter := ADAPTER)
        words = folder if (folder / "tokenizer.json").exists() else base  # it may have been trained on another template
    tokenizer = Tokenizer.load(words)
    return Trained(decoder, adapter, tokenizer, ChatTemplate.open(settings.template, tokenizer))
