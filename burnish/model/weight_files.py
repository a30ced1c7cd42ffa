"""The safetensors files of a checkpoint: opened, checked, read and written one tensor at a time."""

import json
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from burnish.model.families import DecoderConfig
from burnish.model.storage import NF4

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCORE, SCORE_BIAS = "score.weight", "score.bias"
"""The head of a reward model; of a bias `transformers` knows nothing, so that it is stored only where it is not 0."""

Shape = tuple[int, ...]


@contextmanager
def open_weights(folder: Path) -> "Generator[WeightFiles]":
    """The weights in a folder; its index is believed about which files hold them.

    Raises ValueError naming the file that is missing or damaged.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        try:
            names: set[str] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            paths = [folder / name for name in sorted(names)]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index}: not an index of safetensors files; copy it again") from None
    elif single.is_file():
        paths = [single]
    else:
        raise ValueError(f"{folder}: holds no {SINGLE}; only safetensors checkpoints can be read")
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for path in paths:
            try:
                files[path] = stack.enter_context(cast(Any, safe_open(path, framework="pt")))
            except FileNotFoundError:
                if path.exists():
                    raise ValueError(f"{path}: no permission to read it") from None
                raise ValueError(f"{path}: the index names this file, but it is not there; copy it too") from None
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: damaged or cut short ({error}); copy the file again") from None
        yield WeightFiles(folder, files)


class WeightFiles:
    """The tensors of opened files, under the files' names for them.

    The decoder's names differ: older files lack the `model.` in front, those of models that also see have more there.
    """

    def __init__(self, folder: Path, files: Mapping[Path, Any]) -> None:
        self.folder = folder
        self.names: dict[Path, list[str]] = {file: list(handle.keys()) for file, handle in files.items()}
        self.where = {name: file for file, names in self.names.items() for name in names}
        self._handles = {name: files[file] for name, file in self.where.items()}
        embedding = next((name for name in self.where if name.endswith(_EMBEDDING)), f"model.{_EMBEDDING}")
        self._prefix = embedding.removesuffix(_EMBEDDING)
        self._head = next((name for name in self.where if name.endswith(_HEAD)), _HEAD)

    def name_of(self, path: str) -> str:
        """What the files call what the decoder calls `path`."""
        if path == SCORE:
            return SCORE
        return self._head if path == _HEAD else self._prefix + path.removeprefix("model.")

    def path_of(self, name: str) -> str | None:
        """What the decoder calls what the files call `name`; None for a tensor outside the decoder."""
        if name == self._head:
            return _HEAD
        if name in (SCORE, SCORE_BIAS):
            return name
        return f"model.{name.removeprefix(self._prefix)}" if name.startswith(self._prefix) else None

    def header(self, name: str) -> tuple[Shape, torch.dtype]:
        """Shape and dtype of a tensor, which is not read."""
        stored = self._handles[name].get_slice(name)
        if stored.get_dtype() not in _DTYPES:
            raise ValueError(f"{self.where[name]}: {name} is {stored.get_dtype()}, which cannot be read")
        return tuple(stored.get_shape()), _DTYPES[stored.get_dtype()]

    def is_nf4(self, name: str) -> bool:
        """Whether the tensor is a matrix that bitsandbytes has quantised."""
        return f"{name}.quant_state.bitsandbytes__nf4" in self.where

    def tensor(self, name: str, first: int | None = None) -> Tensor:
        """The tensor as it is stored, a view of the file; with `first` only so many of its rows."""
        handle = self._handles[name]
        try:
            return handle.get_tensor(name) if first is None else handle.get_slice(name)[:first]
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{self.where[name]}: {name} cannot be read ({error}); copy the file again") from None

    def weight(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor on the device, in memory of its own, known to be finite."""
        # What safetensors gives is a view of the file, which must not change when the file does.
        weight = self.tensor(name).to(device, copy=True)
        if not weight.is_floating_point():
            raise ValueError(
                f"{self.where[name]}: {name} is {weight.dtype}; give 16-bit, 32-bit or bitsandbytes NF4 weights"
            )
        # The extremes tell without a temporary as large as the weight; NaN is passed on by both.
        if not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(weight)):
            raise ValueError(f"{self.where[name]}: {name} holds NaN or infinite weights; the checkpoint is damaged")
        return weight

    def nf4(self, name: str, shape: Shape) -> NF4:
        """The quantised matrix of this name, in memory of its own, known to have the shape."""
        tensors = {key: self.tensor(key).clone() for key in self.where if key == name or key.startswith(f"{name}.")}
        try:
            stored = NF4.from_bitsandbytes(name.removesuffix(".weight"), tensors)
        except ValueError as error:
            raise ValueError(f"{self.where[name]}: {error}") from None
        if stored.shape != shape:
            raise ValueError(f"{self.where[name]}: {name} has shape {stored.shape} where config.json asks for {shape}")
        return stored

    def check(self, shapes: Mapping[str, Shape], config: DecoderConfig) -> None:
        """Raises ValueError unless the files hold just the tensors of these names and shapes."""
        wanted = {self.name_of(path): shape for path, shape in shapes.items()}
        whole = config.architecture
        if missing := [name for name in wanted if name not in self.where]:
            raise ValueError(
                f"{self.folder}: {_listed(missing)} missing from the checkpoint; it is not a whole {whole}"
            )
        for name, shape in wanted.items():
            found = self.header(name)[0]
            if found != shape and not self.is_nf4(name):
                raise ValueError(f"{self.where[name]}: {name} has shape {found} where config.json asks for {shape}")
        known = (*(f"{name}." for name in wanted if self.is_nf4(name)), *_IGNORED)
        spare = {name for name in self.where if name not in wanted and not name.startswith(known)}
        spare -= {SCORE_BIAS} if SCORE in wanted else set[str]()
        spare = {name for name in spare if not name.endswith(".rotary_emb.inv_freq")}
        if config.tied and self._head in spare:
            spare.remove(self._head)
            self._check_tie()
        if spare:
            raise ValueError(f"{self.folder}: {_listed(sorted(spare))} not part of a {whole} as config.json has it")

    def _check_tie(self) -> None:
        embedding = self._prefix + _EMBEDDING
        if not torch.equal(self.tensor(self._head), self.tensor(embedding)):
            raise ValueError(
                f"{self.where[self._head]}: {self._head} differs from {embedding}, but config.json ties them; "
                "write tie_word_embeddings: false there"
            )


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Gives the tensor when its turn comes, on any device and in any dtype."""

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_shards(entries: Iterable[Entry], max_bytes: int) -> dict[str, list[Entry]]:
    """The entries by the files they go to, each of at most so many bytes where no single entry has more."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_weights(folder: Path, files: Mapping[str, list[Entry]]) -> None:
    """Writes the files, one tensor at a time, and their index unless one file holds everything."""
    for name, entries in files.items():
        _write_file(folder / name, entries)
    if list(files) != [SINGLE]:
        weight_map = {entry.name: name for name, entries in files.items() for entry in entries}
        total = sum(entry.size for entries in files.values() for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, entries: list[Entry]) -> None:
    """One safetensors file, written tensor by tensor: eight bytes of header length, the header as JSON, then the data.

    `safetensors.torch.save_file` would want all tensors in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide numbers first: then every tensor starts at a multiple of its numbers' size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    for entry in entries:
        start, end = end, end + entry.size
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.make().to("cpu", entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest} {'is' if len(names) == 1 else 'are'}"


_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"

_IGNORED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Parts of models that also see, which the decoder does without."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls PyTorch's dtypes."""

_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
