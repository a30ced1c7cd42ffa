"""Where each stage of a pipeline came from: what went into it, what it left. Imports no torch."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

import burnish
from burnish.report.folders import write_whole

FILE = "lineage.json"
LARGE = 64 * 2**20
"""Bytes above which a weight file is read in samples: a base of many gigabytes is looked at before each start."""
NUM_SAMPLES, SAMPLE = 64, 2**16
COUNTED = {".safetensors", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".jinja", ".model", ".py"}
"""Endings of the files that make a model or a data set; others in its folder, a README say, do not change it."""
FILE_SETTINGS = {"path", "from", "general", "function", "template"}
"""The last words of settings that may name a file or a folder."""


def read_lineage(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says about its stages, by name; nothing where no pipeline was."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8"))["stages"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): write folder=DIR with a new path") from None


def write_lineage(folder: Path, stages: Mapping[str, Any]) -> None:
    """Put what is known of the stages into the folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"burnish": burnish.__version__, "stages": stages}
    write_whole(folder / FILE, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def contents(settings: Mapping[str, Any], known: dict[str, str]) -> dict[str, str]:
    """The fingerprint of every file and folder that settings (dotted name -> value) name and that is on this machine.

    `known` remembers fingerprints, so that the base that all stages share is read once. A hub id has none.
    """
    found: dict[str, str] = {}
    for name, value in settings.items():
        if value is None or name.rsplit(".", 1)[-1] not in FILE_SETTINGS:
            continue
        paths = [str(item) for item in cast(list[Any], value)] if isinstance(value, list) else [str(value)]
        places = [place for path in paths if (place := _place(name, path)) is not None]
        for place in places:
            if str(place) not in known:
                known[str(place)] = fingerprint(place)
        if places:
            found[name] = " ".join(known[str(place)] for place in places)
    return found


def fingerprint(place: Path) -> str:
    """Sixteen hex digits of what a file or a folder holds: names and bytes, whatever they are called outside.

    Of a folder with `model` or `adapter` in it, a run, these count. Files that are no part of a model or of a data set
    are left out, and weights of more than 64 MiB are read in 64 samples.
    """
    digest = hashlib.sha256()
    for name, path in _files(place):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(_bytes_of(path))
    return digest.hexdigest()[:16]


def left(folder: Path) -> dict[str, dict[str, Any]]:
    """What a run left to use: each subfolder with weights in it, with its size in bytes and its fingerprint."""
    weights = {path.parent for path in folder.glob("*/*.safetensors")}
    return {
        place.name: {
            "bytes": sum(path.stat().st_size for path in place.rglob("*") if path.is_file()),
            "fingerprint": fingerprint(place),
        }
        for place in sorted(weights)
    }


def facts(folder: Path) -> dict[str, Any]:
    """What a finished run's files say of its base and of the machine and the versions that made it."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    place = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    versions = {name: place.get(name) for name in ("burnish", "commit", "python", "packages", "device", "ranks")}
    return {"base": config["model"]["path"], "versions": versions}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what of a stage's inputs is not what it was."""
    names = [name for name in {**before, **now} if before.get(name, ...) != now.get(name, ...)]
    return [_difference(name, before, now) for name in names]


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if re.match("content of |stage ", name):
        return f"the {name}" if name.startswith("content") else name
    old, new = (json.dumps(tree[name]) if name in tree else "not given" for tree in (before, now))
    return f"{name} ({old} before, {new} now)"


def _place(name: str, value: str) -> Path | None:
    """The file or folder that a setting names, if it is here."""
    package = Path(burnish.__file__).parent
    if value == "embedded":
        return package / "assets" / "base" if name.startswith("model.") else package / "world"
    path = Path(value.rpartition(":")[0] if name.endswith("function") else value)
    return path if value and path.exists() else None


def _files(place: Path) -> Iterator[tuple[str, Path]]:
    if place.is_file():
        yield "", place
        return
    parts = [part for part in (place / "model", place / "adapter") if part.is_dir()]
    for part in parts or [place]:
        for path in sorted(part.rglob("*")):
            name = path.relative_to(place).as_posix()
            if path.is_file() and path.suffix in COUNTED and not re.search(r"(^|/)\.", name):
                yield name, path


def _bytes_of(path: Path) -> bytes:
    """A hash of a file: of all of it, but of samples of large weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".safetensors" or size <= LARGE:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256()
        for number in range(NUM_SAMPLES):  # from the first byte, where the header is, to the last
            file.seek(number * (size - SAMPLE) // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE))
        return digest.digest()
