"""What a finished run left in its folder, read without torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from burnish.data.audit import Audit

Row = dict[str, Any]
"""One run's line of results.json: see `results.finish`."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of a finished run. What a run did not write is empty or None; its row of results is always there."""

    path: Path
    row: Row
    config: dict[str, Any]
    environment: dict[str, Any]
    audit: Audit | None
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl, oldest first."""
    before: dict[str, Any]
    after: dict[str, Any]


def read_run(folder: Path) -> RunFolder:
    """A finished run's files. Raises ValueError when the folder holds no finished run, or a file of it is damaged."""
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}")
    path = folder / "results.json"
    if not path.exists():
        raise ValueError(
            f"{folder} has no results.json: only a finished run can be reported; "
            f"finish it with save.resume=true, or leave it out"
        )
    rows = _read_json(path)
    if not isinstance(rows, list) or len(cast(list[Any], rows)) != 1:
        raise ValueError(
            f"{path} does not hold the one row of a run; name the folders of single runs, not of a comparison"
        )
    return RunFolder(
        path=folder,
        row=start_of(folder) | _mapping(cast(list[Any], rows)[0], path),
        config=_read_yaml(folder / "config.yaml"),
        environment=_read_mapping(folder / "environment.json"),
        audit=_read_audit(folder / "audit.json"),
        metrics=_read_lines(folder / "metrics.jsonl"),
        before=_read_mapping(folder / "before.json"),
        after=_read_mapping(folder / "after.json"),
    )


def start_of(folder: Path) -> dict[str, str]:
    """{"from": the folder of the run that a run started from}; nothing where it started from a base."""
    start = _read_yaml(folder / "config.yaml").get("from")
    if not start:
        return {}
    place = Path(start)
    return {"from": place.parent.name if place.name in ("adapter", "model") else place.name}


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all: a process that dies in between leaves what was there."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def labels(rows: Sequence[Row]) -> list[str]:
    """A name for each run: its method, with its folder (or else its number) where another run has the same method."""
    methods = [str(row["method"]) for row in rows]
    pairs = [(method, str(row.get("run", ""))) for method, row in zip(methods, rows, strict=True)]
    names: list[str] = []
    for number, (method, run) in enumerate(pairs, start=1):
        if methods.count(method) == 1:
            names.append(method)
        else:
            names.append(f"{method} ({run if run and pairs.count((method, run)) == 1 else number})")
    return names


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None


def _read_mapping(path: Path) -> dict[str, Any]:
    return _mapping(_read_json(path), path) if path.exists() else {}


def _read_audit(path: Path) -> Audit | None:
    tree = _read_mapping(path)
    try:
        return Audit.from_dict(tree) if tree else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no audit of this version of Burnish ({' '.join(str(error).split())}); delete it to leave it out"
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")), path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            try:
                found.append(_mapping(json.loads(line), path))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from None
    return found


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold key: value pairs, not a {type(value).__name__}")
    return cast(dict[str, Any], value)
