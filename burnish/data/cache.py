"""Tokenised data on disk, found again by what went into it. Imports no torch."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
from pydantic import TypeAdapter
from safetensors.numpy import load_file, save_file

import burnish
from burnish.data.audit import Audit
from burnish.data.corpus import Corpus
from burnish.types import Prompt

Stored = tuple[Corpus, Corpus, list[Prompt], Audit]


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


def load(folder: Path, key: str) -> Stored | None:
    """What was stored under a key; None when nothing was, or it cannot be read."""
    place = folder / key
    try:
        arrays = load_file(place / "sequences.safetensors")
        tree = json.loads((place / "audit.json").read_text(encoding="utf-8"))
        corpora = [
            Corpus(*(arrays[f"{part}.{name}"] for name in ("ids", "weights", "starts", "rows")))
            for part in ("train", "held_out")
        ]
        return (
            corpora[0],
            corpora[1],
            TypeAdapter(list[Prompt]).validate_python(tree["prompts"]),
            Audit.from_dict(tree["audit"]),
        )
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None


def store(folder: Path, key: str, stored: Stored) -> str | None:
    """Write under a key, whole or not at all. Returns why it could not be written, or None."""
    train, held_out, prompts, audit = stored
    arrays = {
        f"{part}.{name}": getattr(corpus, name)
        for part, corpus in (("train", train), ("held_out", held_out))
        for name in ("ids", "weights", "starts", "rows")
    }
    tree = {"prompts": [asdict(prompt) for prompt in prompts], "audit": audit.as_dict()}
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
