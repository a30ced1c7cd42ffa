"""Models from folders and into folders, in Hugging Face layout, one tensor at a time.

Reading never holds more than one full-precision tensor beside what it becomes, so that a checkpoint much larger than
the host's memory can be quantised onto one card. Everything that a header tells is checked before the first tensor.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from burnish.files import written_aside
from burnish.model.blocks import Norm
from burnish.model.decoder import Decoder
from burnish.model.families import DecoderConfig, read_config, read_json, text_config
from burnish.model.linear import Linear
from burnish.model.storage import NF4, STORAGES, Dense

Shape = tuple[int, ...]


def load_model(
    folder: Path,
    storage: str = "bf16",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    double_quant: bool = True,
) -> Decoder:
    """The model of a folder on the device, its weights kept as `storage` says, its activations in `dtype`.

    Reads one file or shards, 16- or 32-bit weights or bitsandbytes NF4. Raises ValueError naming the file and the
    tensor that is missing, unexpected, misshapen, not finite or damaged.
    """
    config = read_config(folder)
    with ExitStack() as stack:
        files = _open(folder, stack)
        checkpoint = _Checkpoint(files, config, _Keeping(storage, torch.device(device), double_quant))
        checkpoint.check(weight_shapes(config), config)
        return Decoder(config, checkpoint, dtype)


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
) -> None:
    """Writes the model as a folder that `transformers` loads: safetensors, `config.json`, and the tokenizer's files.

    `source` is the folder the model was read from, whose other files are copied. With `adapter` the weights are the
    merged ones. The folder appears whole or not at all; one tensor at a time is held in memory.
    """
    raw = {key: value for key, value in text_config(read_json(source)).items() if key != "quantization_config"}
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(dtype).removeprefix("torch.")
    with written_aside(folder) as aside:
        (aside / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, aside / name)
        _write_shards(aside, list(_dense_tensors(model, adapter)), dtype, max_shard_bytes)


def weight_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    outline = _Outline({})
    Decoder(config, outline, torch.float32)
    return outline.shapes


def base_fingerprint(folder: Path) -> str:
    """Sixteen hex digits that tell the model in a folder from others, its own fine-tunes among them.

    They hash, in bf16, the first rows of every matrix and the whole of every norm and bias: some megabytes are read of
    a model of many gigabytes. They are the same however the weights are sharded, and whether they are stored in 32 bits
    or rounded to bf16; a bitsandbytes NF4 checkpoint of the same model has digits of its own. The head is left out:
    a tied one may be stored or not. Raises ValueError for files that cannot be read.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = _open(folder, stack)
        where = {name: handle for handle in files.values() for name in handle.keys()}  # noqa: SIM118
        prefix = _prefix(where)
        for name in sorted(name for name in where if name.startswith(prefix)):
            # The scales and tables of a quantised weight are called NAME.weight.SOMETHING.
            if name.endswith((".weight", ".bias")) and not name.endswith("lm_head.weight"):
                part = _first_rows(where[name].get_slice(name))
                digest.update(f"{name.removeprefix(prefix)} {tuple(part.shape)}\n".encode())
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Keeping:
    """How and where weights are kept."""

    storage: str
    device: torch.device
    double_quant: bool

    @property
    def trained(self) -> bool:
        return self.storage == "full"

    def linear(self, weight: Tensor, bias: nn.Parameter | None, path: str) -> Linear:
        """The weight as a linear layer; the head is never quantised, as in every 4-bit checkpoint."""
        storage = "bf16" if path == "lm_head" and self.storage == "nf4" else self.storage
        return Linear(STORAGES[storage].encode(weight, self.double_quant), bias)

    def parameter(self, weight: Tensor) -> nn.Parameter:
        """The embedding matrix in 16 bits unless the storage has 32; norms and biases, which are small, in 32."""
        half = weight.ndim == 2 and self.storage in ("bf16", "nf4")
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


class _Checkpoint:
    """Weights out of safetensors files, under the names a decoder asks for."""

    def __init__(self, files: dict[Path, Any], config: DecoderConfig, keeping: _Keeping) -> None:
        self.keeping = keeping
        self.files = files
        self.where = {name: file for file, handle in files.items() for name in handle.keys()}  # noqa: SIM118
        self.prefix = _prefix(self.where)
        self.head = next((name for name in self.where if name.endswith("lm_head.weight")), "lm_head.weight")

    def check(self, shapes: Mapping[str, Shape], config: DecoderConfig) -> None:
        """Raises ValueError unless the files hold just the tensors of these names and shapes."""
        wanted = {self._name(path): shape for path, shape in shapes.items()}
        place = next(iter(self.files)).parent
        if missing := [name for name in wanted if name not in self.where]:
            raise ValueError(
                f"{place}: {_listed(missing)} missing from the checkpoint; it is not a whole {config.architecture}"
            )
        for name, shape in wanted.items():
            found = tuple(self.files[self.where[name]].get_slice(name).get_shape())
            if found != shape and not self._is_nf4(name):
                raise ValueError(f"{self.where[name]}: {name} has shape {found} where config.json asks for {shape}")
        known = (*(f"{name}." for name in wanted if self._is_nf4(name)), *_IGNORED)
        spare = {name for name in self.where if name not in wanted and not name.startswith(known)}
        spare = {name for name in spare if not name.endswith(".rotary_emb.inv_freq")}
        if config.tied and self.head in spare:
            spare.remove(self.head)
            self._check_tie()
        if spare:
            raise ValueError(
                f"{place}: {_listed(sorted(spare))} not part of a {config.architecture} as config.json describes it"
            )

    def linear(self, path: str, shape: tuple[int, int], bias: bool) -> Linear:
        """The linear layer of this path; see `Weights`."""
        name = self._name(f"{path}.weight")
        parameter = self.parameter(f"{path}.bias", shape[:1]) if bias else None
        if not self._is_nf4(name):
            return self.keeping.linear(self._read(name), parameter, path)
        tensors = {key: self._get(key) for key in self.where if key == name or key.startswith(f"{name}.")}
        stored = NF4.from_bitsandbytes(name.removesuffix(".weight"), tensors).to(self.keeping.device)
        if stored.shape != shape:
            raise ValueError(f"{self.where[name]}: {name} has shape {stored.shape} where config.json asks for {shape}")
        if self.keeping.storage == "nf4":
            return Linear(stored, parameter)
        return self.keeping.linear(stored.dense(torch.float32), parameter, path)

    def parameter(self, path: str, shape: Shape) -> nn.Parameter:
        """The embedding, norm or bias of this path; see `Weights`."""
        return self.keeping.parameter(self._read(self._name(path)))

    def _name(self, path: str) -> str:
        """What the files call the tensor."""
        return self.head if path == "lm_head.weight" else self.prefix + path.removeprefix("model.")

    def _is_nf4(self, name: str) -> bool:
        return f"{name}.quant_state.bitsandbytes__nf4" in self.where

    def _get(self, name: str) -> Tensor:
        try:
            return self.files[self.where[name]].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{self.where[name]}: {name} cannot be read ({error}); copy the file again") from None

    def _read(self, name: str) -> Tensor:
        """The tensor on the device, in memory of its own, known to be finite."""
        # What safetensors gives is a view of the file, which must not change when the file does.
        weight = self._get(name).to(self.keeping.device, copy=True)
        if not weight.is_floating_point():
            raise ValueError(
                f"{self.where[name]}: {name} is {weight.dtype}; give 16-bit, 32-bit or bitsandbytes NF4 weights"
            )
        # The extremes tell without a temporary as large as the weight; NaN is passed on by both.
        if not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(weight)):
            raise ValueError(f"{self.where[name]}: {name} holds NaN or infinite weights; the checkpoint is damaged")
        return weight

    def _check_tie(self) -> None:
        embedding = f"{self.prefix}embed_tokens.weight"
        if not torch.equal(self._get(self.head), self._get(embedding)):
            raise ValueError(
                f"{self.where[self.head]}: {self.head} differs from {embedding}, but config.json ties them; "
                "write tie_word_embeddings: false there"
            )


def _open(folder: Path, stack: ExitStack) -> dict[Path, Any]:
    """Every safetensors file of the checkpoint, opened; its index is believed about which those are."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names: set[str] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{index}: not an index of safetensors files; copy it again") from None
        paths = [folder / name for name in sorted(names)]
    elif single.is_file():
        paths = [single]
    else:
        raise ValueError(f"{folder}: holds no model.safetensors; only safetensors checkpoints can be read")
    files: dict[Path, Any] = {}
    for path in paths:
        try:
            files[path] = stack.enter_context(cast(Any, safe_open(path, framework="pt")))
        except FileNotFoundError:
            raise ValueError(f"{path}: the index names this file, but it is not there; copy it too") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or cut short ({error}); copy the file again") from None
    return files


def _prefix(names: Iterable[str]) -> str:
    """What the names of a checkpoint have in place of the decoder's `model.`.

    Older files lack it, those of models that also see have more in front.
    """
    ending = "embed_tokens.weight"
    return next((name.removesuffix(ending) for name in names if name.endswith(ending)), "model.")


def _first_rows(stored: Any) -> Tensor:
    """The first rows of a matrix, or a whole vector, in bf16; of what is not floating point, the first values."""
    if len(stored.get_shape()) == 1:
        return stored[:].to(torch.bfloat16)
    part: Tensor = stored[:4]
    return part.to(torch.bfloat16) if part.is_floating_point() else stored[:4096]


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest} {'is' if len(names) == 1 else 'are'}"


Entry = tuple[str, Shape, Callable[[], Tensor]]
"""A tensor to be written: its name, its shape, and how to make it."""


def _dense_tensors(model: Decoder, adapter: str | None) -> Iterator[Entry]:
    """Every tensor of the checkpoint, to be made when its turn comes."""
    for path, module in model.named_modules():
        if isinstance(module, Norm) or path == "model.embed_tokens":
            weight = cast(Tensor, module.weight)
            yield f"{path}.weight", tuple(weight.shape), lambda weight=weight: weight.detach()
        elif isinstance(module, Linear) and not (path == "lm_head" and model.config.tied):
            yield f"{path}.weight", module.shape, lambda module=module: _merged(module, adapter)[0]
            if module.bias is not None:
                yield f"{path}.bias", module.shape[:1], lambda module=module: cast(Tensor, _merged(module, adapter)[1])


def _merged(linear: Linear, adapter: str | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, with the change of its adapter in them."""
    weight, bias = linear.weight.dense(torch.float32).detach(), linear.bias
    if adapter is None or adapter not in linear.adapters:
        return weight, bias
    change = cast(Any, linear.adapters[adapter])
    return change.merge(weight), None if bias is None else change.merge_bias(bias.detach())


def _write_shards(folder: Path, entries: list[Entry], dtype: torch.dtype, max_bytes: int) -> None:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = math.prod(entry[1]) * dtype.itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard, dtype)
        weight_map |= dict.fromkeys((entry[0] for entry in shard), name)
    total = sum(math.prod(shape) for _, shape, _ in entries) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, entries: list[Entry], dtype: torch.dtype) -> None:
    """One safetensors file, written tensor by tensor: eight bytes of header length, the header as JSON, then the data.

    `safetensors.torch.save_file` would want all tensors in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in entries:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape, make in entries:
            tensor = make().to("cpu", dtype).contiguous()
            assert tuple(tensor.shape) == shape
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

_IGNORED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Parts of models that also see, which the decoder does without."""

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What is copied beside the weights, where the source has it."""
