"""Models from folders and into folders, in Hugging Face layout, one tensor at a time.

Reading never holds more than one full-precision tensor, or one block as it is kept, beside what it becomes, so that a
checkpoint much larger than the host's memory can be quantised onto one card. Everything that a header tells is checked
before the first tensor.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from burnish.files import written_aside
from burnish.model.blocks import Norm
from burnish.model.decoder import Decoder
from burnish.model.families import DecoderConfig, read_config, read_json, scoring_name, text_config
from burnish.model.heads import ScalarHead, add_head
from burnish.model.linear import Linear
from burnish.model.storage import NF4, STORAGES, Dense
from burnish.model.weight_files import (
    SCORE,
    SCORE_BIAS,
    Entry,
    Shape,
    WeightFiles,
    in_shards,
    open_weights,
    write_weights,
)
from burnish.settings import TRAINED_STORAGES


def load_model(
    folder: Path,
    storage: str = "bf16",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    double_quant: bool = True,
    head: str | None = None,
) -> Decoder:
    """The model of a folder on the device, its weights kept as `storage` says, its activations in `dtype`.

    Reads one file or shards, 16- or 32-bit weights or bitsandbytes NF4. With `head` the folder must hold a reward
    model, whose scalar head goes by that name. Raises ValueError naming the file and the tensor that is missing,
    unexpected, misshapen, not finite or damaged.
    """
    config = read_config(folder, scores=head is not None)
    with open_weights(folder) as files:
        files.check(weight_shapes(config), config)
        model = Decoder(config, _Checkpoint(files, _Keeping(storage, torch.device(device), double_quant)), dtype)
        if head is not None:
            scalar = add_head(model, head, config.hidden_size, torch.Generator())
            scalar.weight.data.copy_(files.weight(SCORE))
            scalar.bias.data.copy_(files.weight(SCORE_BIAS) if SCORE_BIAS in files.where else torch.zeros(1))
            scalar.requires_grad_(storage in TRAINED_STORAGES)
        return model


def init_model(
    folder: Path,
    seed: int,
    storage: str = "full",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    double_quant: bool = True,
) -> Decoder:
    """A model with random weights for the `config.json` of a folder, made on the device itself.

    Matrices are normal with the config's `initializer_range`, biases 0, norms 1.
    """
    config = read_config(folder)
    keeping = _Keeping(storage, torch.device(device), double_quant)
    generator = torch.Generator(device=device).manual_seed(seed)
    return Decoder(config, _Chance(keeping, generator, config), dtype)


def save_model(
    model: Decoder,
    folder: Path,
    source: Path,
    dtype: torch.dtype = torch.bfloat16,
    adapter: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    bitsandbytes: bool = False,
    head: str | None = None,
) -> None:
    """Writes the model as a folder that `transformers` loads: safetensors, `config.json`, and the tokenizer's files.

    `source` is the folder the model was read from, whose other files are copied. With `adapter` the weights are the
    merged ones. With `bitsandbytes` a model whose storage is nf4 keeps its 4 bits, in the layout of that library, and
    `dtype` is that of everything else and of what the 4 bits are computed with. With `head`, the name of a scalar head,
    it is a model for sequence classification with one label, and that head, in fp32, takes the place of the language
    model's. The folder appears whole or not at all; one tensor at a time is held in memory. Raises ValueError for 4
    bits that are not there to be written, and for an adapter on a head that is tied to the embedding.
    """
    raw = {key: value for key, value in text_config(read_json(source)).items() if key != "quantization_config"}
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(dtype).removeprefix("torch.")
    if bitsandbytes:
        raw["quantization_config"] = _quantization(model, adapter, dtype)
    if head is not None:
        raw |= _scoring(raw, source)
    if adapter is not None and model.config.tied and adapter in model.lm_head.adapters:
        raise ValueError(
            f"{folder}: the head is the embedding matrix itself; merged, an adapter on it would change both"
        )
    with written_aside(folder) as aside:
        (aside / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_tokenizer(source, aside, "generation_config.json")
        entries = _entries(model, adapter, dtype, bitsandbytes, head)
        write_weights(aside, in_shards(entries, max_shard_bytes))


def copy_tokenizer(source: Path, folder: Path, *others: str) -> None:
    """Copies the tokenizer's files, its chat template and files of these other names, where the source has them."""
    for name in (*_TOKENIZER_FILES, *others):
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def weight_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    outline = _Outline({})
    Decoder(config, outline, torch.float32)
    return outline.shapes | ({SCORE: (1, config.hidden_size)} if config.scores else {})


def base_fingerprint(folder: Path) -> str:
    """Sixteen hex digits that tell the model in a folder from others, its own fine-tunes among them.

    They hash, in bf16, the first 16,384 values of every matrix, norm and bias, so that some megabytes are read of a
    model of many gigabytes. They are the same however the weights are sharded, and whether they are stored in 32 bits
    or rounded to bf16; a bitsandbytes NF4 checkpoint of the same model has digits of its own. The head is left out:
    a tied one may be stored or not, and a reward model has another. Raises ValueError for files that cannot be read.
    """
    digest = hashlib.sha256()
    with open_weights(folder) as files:
        names = {files.path_of(name): name for name in files.where}
        # The scales and tables of a quantised weight are called NAME.weight.SOMETHING.
        paths = [path for path in names if path is not None and path.endswith((".weight", ".bias"))]
        for path in sorted(path for path in paths if path.startswith("model.")):
            shape, _ = files.header(names[path])
            part = files.tensor(names[path], first=-(-16_384 // math.prod(shape[1:])))
            digest.update(f"{path} {shape}\n".encode())
            digest.update(part.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Keeping:
    """How and where weights are kept."""

    storage: str
    device: torch.device
    double_quant: bool

    @property
    def trained(self) -> bool:
        return self.storage in TRAINED_STORAGES

    def linear(self, weight: Tensor, bias: nn.Parameter | None, path: str) -> Linear:
        """The weight as a linear layer; the head is never quantised, as in every 4-bit checkpoint."""
        storage = "bf16" if path == "lm_head" and self.storage == "nf4" else self.storage
        return Linear(STORAGES[storage].encode(weight, self.double_quant), bias)

    def parameter(self, weight: Tensor) -> nn.Parameter:
        """Embeddings in 16 bits unless the storage has 32; norms and biases, which are small, in 32 but for full16."""
        half = self.storage == "full16" or (weight.ndim == 2 and self.storage in ("bf16", "nf4"))
        return nn.Parameter(weight.to(torch.bfloat16 if half else torch.float32), requires_grad=self.trained)


@dataclass(frozen=True, slots=True)
class _Outline:
    """Weights without content: what a decoder asks for is written down."""

    shapes: dict[str, Shape]

    def linear(self, path: str, shape: tuple[int, int], bias: bool) -> Linear:
        weight = self.parameter(f"{path}.weight", shape)
        return Linear(Dense(weight.detach(), False), self.parameter(f"{path}.bias", shape[:1]) if bias else None)

    def parameter(self, path: str, shape: Shape) -> nn.Parameter:
        self.shapes[path] = shape
        return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


@dataclass(frozen=True, slots=True)
class _Chance:
    """Random weights, drawn on the device."""

    keeping: _Keeping
    generator: torch.Generator
    config: DecoderConfig

    def linear(self, path: str, shape: tuple[int, int], bias: bool) -> Linear:
        parameter = self.keeping.parameter(torch.zeros(shape[0], device=self.keeping.device)) if bias else None
        return self.keeping.linear(self._normal(shape), parameter, path)

    def parameter(self, path: str, shape: Shape) -> nn.Parameter:
        ones = torch.full(shape, 1 - self.config.norm_offset, device=self.keeping.device)
        return self.keeping.parameter(self._normal(shape) if len(shape) == 2 else ones)

    def _normal(self, shape: Shape) -> Tensor:
        weight = torch.empty(shape, device=self.keeping.device)
        return weight.normal_(std=self.config.initializer_range, generator=self.generator)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """Weights out of files, under the names a decoder asks for."""

    files: WeightFiles
    keeping: _Keeping

    def linear(self, path: str, shape: tuple[int, int], bias: bool) -> Linear:
        """The linear layer of this path; see `Weights`."""
        name = self.files.name_of(f"{path}.weight")
        parameter = self.parameter(f"{path}.bias", shape[:1]) if bias else None
        if not self.files.is_nf4(name):
            return self.keeping.linear(self.files.weight(name, self.keeping.device), parameter, path)
        stored = self.files.nf4(name, shape).to(self.keeping.device)
        if self.keeping.storage == "nf4":
            return Linear(stored, parameter)
        return self.keeping.linear(stored.dense(torch.float32), parameter, path)

    def parameter(self, path: str, shape: Shape) -> nn.Parameter:
        """The embedding, norm or bias of this path; see `Weights`."""
        return self.keeping.parameter(self.files.weight(self.files.name_of(path), self.keeping.device))


def _entries(
    model: Decoder, adapter: str | None, dtype: torch.dtype, bitsandbytes: bool, head: str | None
) -> Iterator[Entry]:
    """Every tensor of the checkpoint, to be made when its turn comes."""
    if head is not None:
        scalar = cast(ScalarHead, model.heads[head])
        yield Entry(SCORE, tuple(scalar.weight.shape), torch.float32, scalar.weight.detach)
        if bool(scalar.bias):
            yield Entry(SCORE_BIAS, (1,), torch.float32, scalar.bias.detach)
    for path, module in model.named_modules():
        if isinstance(module, Norm) or path == "model.embed_tokens":
            weight = cast(Tensor, module.weight)
            yield Entry(f"{path}.weight", tuple(weight.shape), dtype, weight.detach)
        elif isinstance(module, Linear) and not (path == "lm_head" and (model.config.tied or head is not None)):
            if bitsandbytes and isinstance(module.stored, NF4):
                for name, tensor in module.stored.to_bitsandbytes(path, dtype).items():
                    yield Entry(name, tuple(tensor.shape), tensor.dtype, tensor.detach)
            else:
                yield Entry(f"{path}.weight", module.shape, dtype, partial(_weight, module, adapter))
            if module.bias is not None:
                yield Entry(f"{path}.bias", module.shape[:1], dtype, partial(_bias, module, adapter))


def _weight(linear: Linear, adapter: str | None) -> Tensor:
    """The weight of a layer, with the change of its adapter in it."""
    weight = linear.weight.dense(torch.float32).detach()
    if adapter is None or adapter not in linear.adapters:
        return weight
    return cast(Any, linear.adapters[adapter]).merge(weight)


def _bias(linear: Linear, adapter: str | None) -> Tensor:
    """The bias of a layer, with the change of its adapter in it."""
    bias = cast(Tensor, linear.bias).detach()
    if adapter is None or adapter not in linear.adapters:
        return bias
    return cast(Any, linear.adapters[adapter]).merge_bias(bias)


def _scoring(raw: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """What `config.json` says of a reward model and not of the model in `source` that writes."""
    return {
        "architectures": [scoring_name(raw["architectures"][0])],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": _pad_id(raw, source),
    }


def _pad_id(raw: Mapping[str, Any], source: Path) -> int | None:
    """A token that pads and ends nothing: `transformers` reads the score before the last run of it.

    None where the tokenizer has none: then it refuses to score several answers at once, and misreads none.
    """
    tokens = _json_object(source / "tokenizer.json").get("added_tokens") or []
    ids: dict[str, int] = {token["content"]: token["id"] for token in tokens}
    named = _json_object(source / "special_tokens_map.json") | _json_object(source / "tokenizer_config.json")

    def id_of(name: str) -> int | None:
        token: Any = named.get(name)
        return ids.get(token["content"] if isinstance(token, dict) else token or "")

    ends: set[Any] = {id_of("eos_token")}
    for config in (raw, _json_object(source / "generation_config.json")):
        end = config.get("eos_token_id")
        ends |= set(cast(list[int], end)) if isinstance(end, list) else {end}
    candidates = (raw.get("pad_token_id"), id_of("pad_token"), id_of("unk_token"))
    return next((token for token in candidates if token is not None and token not in ends), None)


def _json_object(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _quantization(model: Decoder, adapter: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """What `transformers` must be told of the model's 4 bits. Raises ValueError where they are not there."""
    if adapter is not None:
        raise ValueError(f"the adapter {adapter} cannot be merged into 4 bits: merge it into 16 or 32")
    layers = {path: module.stored for path, module in model.named_modules() if isinstance(module, Linear)}
    del layers["lm_head"]
    quantised = [layer for layer in layers.values() if isinstance(layer, NF4)]
    if len(quantised) < len(layers):
        raise ValueError("the model is not in 4 bits: load it with model.storage=nf4 to write it for bitsandbytes")
    return {
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": bool(quantised[0].nested.numel()),
        "llm_int8_skip_modules": ["lm_head"],
        "load_in_4bit": True,
        "quant_method": "bitsandbytes",
    }


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)
