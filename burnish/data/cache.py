"""Tokenised data, and how it is kept on disk and found again by what went into it. Imports no torch."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import safetensors
import tokenizers
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.numpy import load_file, save_file

import burnish
from burnish.data.audit import Audit
from burnish.types import Prompt


class InArrays(Protocol):
    """What is kept in arrays, by name."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays it is made of."""
        ...

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The same again. Raises KeyError for an array that is missing."""
        ...


Tokenised = TypeVar("Tokenised", bound=InArrays)


@dataclass(frozen=True, slots=True)
class Prepared(Generic[Tokenised]):
    """Data ready for a run, and the account of how it came about."""

    train: Tokenised
    held_out: Tokenised
    prompts: list[Prompt]
    audit: Audit
    cached: bool = False
    """Whether it was found on disk, tokenised before."""


def remembered(
    folder: Path, key: str, kind: type[Tokenised], make: Callable[[], Prepared[Tokenised]]
) -> Prepared[Tokenised]:
    """What is kept under a key in a folder; else what `make` makes, kept from now on."""
    found = load(folder, key, kind)
    if found is not None:
        return found
    made = make()
    problem = store(folder, key, made)
    if problem:
        note = f"tokenised data could not be kept in {folder} ({problem}), so the next run tokenises again"
        return replace(made, audit=replace(made.audit, notes=(*made.audit.notes, note)))
    return made


def default_folder() -> Path:
    """Where tokenised data is kept unless told otherwise: `burnish` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish" / "data"


def key_of(parts: Mapping[str, Any]) -> str:
    """A name for the data that these parts lead to: it changes with each of them and with the code that reads them."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    whole = {**parts, "code": code.hexdigest(), "burnish": burnish.__version__, "tokenizers": tokenizers.__version__}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load(folder: Path, key: str, kind: type[Tokenised]) -> Prepared[Tokenised] | None:
    """What was stored under a key; None when nothing was, or it cannot be read."""
    place = folder / key
    try:
        arrays = load_file(place / "sequences.safetensors")
        tree = json.loads((place / "audit.json").read_text(encoding="utf-8"))
        train, held_out = (
            kind.from_arrays(
                {name.removeprefix(part): array for name, array in arrays.items() if name.startswith(part)}
            )
            for part in ("train.", "held_out.")
        )
        prompts = TypeAdapter(list[Prompt]).validate_python(tree["prompts"])
        return Prepared(train, held_out, prompts, Audit.from_dict(tree["audit"]), cached=True)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None


def store(folder: Path, key: str, made: Prepared[Tokenised]) -> str | None:
    """Write under a key, whole or not at all. Returns why it could not be written, or None."""
    arrays = {
        f"{part}.{name}": array
        for part, kept in (("train", made.train), ("held_out", made.held_out))
        for name, array in kept.arrays().items()
    }
    tree = {"prompts": [asdict(prompt) for prompt in made.prompts], "audit": made.audit.as_dict()}
    aside = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
        save_file(arrays, aside / "sequences.safetensors")
        (aside / "audit.json").write_text(json.dumps(tree), encoding="utf-8")
        if (folder / key).exists():  # unreadable, or written by another rank just now
            shutil.rmtree(folder / key, ignore_errors=True)
        aside.rename(folder / key)
    except (OSError, safetensors.SafetensorError) as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        # Another rank may have put the same data there first, which is as good.
        return None if (folder / key).exists() else str(error)
    return None
