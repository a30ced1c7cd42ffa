"""Rows out of JSONL, JSON, Parquet and text files, each with the place it came from. Imports no torch."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from burnish.config import missing
from burnish.data.hub import hub_files, is_hub_id, split_files

Row = tuple[str, dict[str, Any]]
"""Where a row stands ("file:line" or "dataset[row]"), and its columns."""

EMBEDDED = "embedded"
"""The data that ships with the package."""


def read_rows(path: str | tuple[str, ...], split: str = "train", limit: int | None = None) -> Iterator[Row]:
    """The rows of one or several files or data sets, one after the other, at most `limit` of them.

    Raises ValueError naming file and line for a file that is missing or of an unknown kind, and for a row that is not
    a JSON object.
    """
    left = limit
    for name in (path,) if isinstance(path, str) else path:
        for row in _embedded(split) if name == EMBEDDED else _rows_of_files(data_files(name, split)):
            if left is not None and left <= 0:
                return
            left = None if left is None else left - 1
            yield row


def data_files(name: str, split: str = "train") -> list[Path]:
    """The local files behind one entry of data.path: a file, or the split's files in a folder or hub data set."""
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise ValueError(f"{path}: Burnish reads {_kinds()} files, not '{path.suffix or 'no ending'}'")
        return [path]
    if path.is_dir():
        found = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.suffix in READERS]
        return [path / file for file in split_files(found, split, name)]
    if path.suffix.lower() in READERS or not is_hub_id(name):
        raise ValueError(missing("file", path))
    return hub_files(name, split, tuple(READERS))


def has_split(name: str, split: str) -> bool:
    """Whether a folder or hub data set has a split of this name."""
    try:
        return bool(data_files(name, split))
    except ValueError:
        return False


def digest(path: str | tuple[str, ...], split: str) -> str:
    """A hash of every byte that `read_rows` would read, so that a cache knows when data changed."""
    total = hashlib.sha256()
    for name in (path,) if isinstance(path, str) else path:
        if name == EMBEDDED:
            for _, row in _embedded(split):
                total.update(json.dumps(row, sort_keys=True).encode())
            continue
        for file in data_files(name, split):
            with file.open("rb") as handle:
                total.update(f"\0{file.suffix}\0".encode() + hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def _embedded(split: str) -> Iterator[Row]:
    from burnish.world import rows  # the generator writes thousands of rows: only when asked for

    for number, row in enumerate(rows(split)):
        yield f"embedded/{split}[{number}]", row


def _rows_of_files(files: list[Path]) -> Iterator[Row]:
    for file in files:
        try:
            yield from READERS[file.suffix.lower()](file)
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None


def _read_lines(path: Path) -> Iterator[Row]:
    """One JSON object a line; blank lines are skipped."""
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                origin = f"{path}:{number}"
                yield origin, _object(_parse(line, origin), origin)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, or an object whose only list is the rows; lines of objects under a .json name will do."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    first = content.lstrip().split(b"\n", 1)
    if len(first) == 2 and first[1].strip() and first[0].startswith(b"{") and _is_json(first[0]):
        yield from _read_lines(path)
        return
    value = _parse(content, str(path))
    if isinstance(value, dict):
        lists = [key for key, entry in value.items() if isinstance(entry, list)]
        if len(lists) != 1:
            raise ValueError(f"{path} should hold a list of rows, or one object a line, not a single object")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise ValueError(f"{path} should hold a list of rows, not {kind_of(value)}")
    for number, row in enumerate(value):
        origin = f"{path}[{number}]"
        yield origin, _object(row, origin)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # 0.1 s to import, wanted by Parquet files alone
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"{path}[{number}]", {name: _without_nulls(value) for name, value in row.items()}
                    number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from None


def _without_nulls(value: Any) -> Any:
    """A nested value as it was before Parquet gave every object the keys of all the others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_text(path: Path) -> Iterator[Row]:
    """One document for each run of lines between blank lines."""
    lines: list[str] = []
    start = 1
    with path.open(encoding="utf-8-sig") as handle:
        try:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    start = start if lines else number
                    lines.append(line)
                elif lines:
                    yield f"{path}:{start}", {"text": "".join(lines).rstrip("\n")}
                    lines = []
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if lines:
        yield f"{path}:{start}", {"text": "".join(lines).rstrip("\n")}


def kind_of(value: Any) -> str:
    """What a JSON value is, in words: "a list", "text", "nothing"."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing (null)"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _object(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: a row is a JSON object {{...}}, not {kind_of(value)}")
    return value


def _parse(content: bytes, origin: str) -> Any:
    try:
        return json.loads(content.decode("utf-8").rstrip("\r\n"), object_pairs_hook=_each_key_once)
    except _Twice as twice:
        raise ValueError(f"{origin}: the key '{twice}' stands twice; one of its values would be lost") from None
    except UnicodeDecodeError as error:
        if content.startswith(b"\x1f\x8b"):
            raise ValueError(f"{origin}: this is a gzip file; unpack it first") from None
        raise ValueError(
            f"{origin}: not UTF-8 text ({error.reason} at byte {error.start} of it); save it as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{origin}: not JSON ({error.msg} at {line}column {error.colno})") from None


class _Twice(Exception):
    """A key that a JSON object has twice."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _kinds() -> str:
    return ", ".join(READERS)


READERS = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
"""File kinds by their ending."""
