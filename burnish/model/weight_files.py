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
HEAD = "lm_head.weight"

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
        self._head = next((name for name in self.where if name.endswith(HEAD)), HEAD)

    def name_of(self, path: str) -> str:
        """What the files call what the decoder calls `path`."""
        return self._head if path == HEAD else self._prefix + path.removeprefix("model.")

    def path_of(self, name: str) -> str | None:
        """What the decoder calls what the files call `name`; None for a tensor outside the decoder."""
        if name == self._head:
            return HEAD
        return f"model.{name.removeprefix(self._prefix)}" if name.startswith(self._prefix) else None

    def check(self, shapes: Mapping[str, Shape], config: DecoderConfig) -> None:
        """Raises ValueError unless the files hold just the tensors of these names and shapes."""
        wanted = {self.name_of(path): shape for path, shape in shapes.items()}
        if missing := [name for name in wanted if name not in self.where]:
            raise ValueError(
                f"{self.folder}: {_listed(missing)} missing from the checkpoint; it is not a whole {config.architecture}"
            )
        for name, shape in wanted.items():
            found = self.nf4_shape(name) if self.is_nf4(name) else self.stored(name).shape
            if found != shape:
                raise ValueError(f"{self.where[name]}: {name} has shape {found} where config.json asks for {shape}")
        known = (*(f"{name}." for name in wanted if self.is_nf4(name)), *_IGNORED)
        spare = {name for name in self.where if name not in wanted and not name.startswith(known)}
        spare = {name for name in spare if not name.endswith(".rotary_emb.inv_freq")}
        if config.tied and self._head in spare:
            spare.remove(self._head)
            self._check_tie()
        if spare:
            raise ValueError(
                f"{self.folder}: {_listed(sorted(spare))} not part of a {config.architecture} as config.json describes it"
            )
