"""From data.path to clean rows: read, recognise, repair, and say where each stands. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from burnish.data.audit import Tally
from burnish.data.files import EMBEDDED, READERS, Row, read_rows
from burnish.data.formats import FORMATS, Reading, announce, check_format, disagreement, recognise, task_of
from burnish.data.hub import is_hub_id
from burnish.data.repair import repair
from burnish.settings import DataSettings
from burnish.types import Example, Prompt, Text

SAMPLE = 100
"""Rows that the format is recognised from; every further row is checked against it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A row as it was read: what it says, and where it stands."""

    row: int
    place: str
    example: Example | Text
    task: str | None


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a data set after reading and repair."""

    format: str
    reading: str
    """How they were read, in words."""
    count: int
    """Rows before repair."""
    sources: list[Source]
    prompts: list[tuple[int, str, Prompt]]
    """Rows without an answer to train on: number, place, prompt."""


def read_sources(
    path: str | tuple[str, ...], split: str, data: DataSettings, dropped: Tally, repaired: Tally, format: str = "auto"
) -> Rows:
    """The clean rows of a data set; what was repaired or dropped is counted in the tallies.

    Raises ValueError naming the place for a row that cannot be read.
    """
    rows = list(read_rows(path, split, data.limit))
    if not rows:
        raise ValueError(f"{joined(path)} holds no rows")
    name = _format_of(rows, format)
    read = Rows(name, announce(name, [row for _, row in rows[:SAMPLE]]), len(rows), [], [])
    for number, (place, row) in enumerate(rows):
        reading = _read(name, place, row)
        if isinstance(reading, Prompt):
            read.prompts.append((number, place, reading))
            continue
        result = repair(reading, exported=name == "sharegpt")
        if result.rules and not data.repair:
            dropped.add(result.rules[0], number, place, _opening(reading))
        elif result.example is None:
            assert result.dropped is not None
            dropped.add(result.dropped, number, place, _opening(reading))
        else:
            for rule in result.rules:
                repaired.add(rule, number, place, _opening(reading))
            read.sources.append(Source(number, place, result.example, task_of(row)))
    return read


def check_data(data: DataSettings) -> str:
    """How the data reads, from its first rows; fast, without a tokenizer, a network or torch.

    Raises ValueError for a missing file, a broken first row, or columns that no format (or not the named one) has.
    """
    check_format(data.format)
    told: list[str] = []
    for name in (data.path,) if isinstance(data.path, str) else data.path:
        if is_remote(name):
            told.append(f"{name}: a hub data set, read when the run starts")
            continue
        rows = list(read_rows(name, data.split, min(SAMPLE, data.limit or SAMPLE)))
        if not rows:
            raise ValueError(f"{name} holds no rows")
        format = _format_of(rows, data.format)
        for place, row in rows:
            _read(format, place, row)
        told.append(f"{name} {announce(format, [row for _, row in rows])}")
    return "; ".join(told)


def joined(path: str | tuple[str, ...]) -> str:
    """The names of a data.path, in one line."""
    return path if isinstance(path, str) else ", ".join(path)


def is_remote(name: str) -> bool:
    """Whether a name is that of a hub data set: nothing of that name is here, and it looks like one."""
    path = Path(name)
    return name != EMBEDDED and not path.exists() and path.suffix.lower() not in READERS and is_hub_id(name)


def _format_of(rows: list[Row], setting: str) -> str:
    if setting != "auto":
        return setting
    sample = rows[:SAMPLE]
    return recognise([row for _, row in sample], [place for place, _ in sample])


def _read(name: str, place: str, row: dict[str, object]) -> Reading:
    if not FORMATS[name].fits(row):
        raise ValueError(disagreement(place, name, row))
    try:
        return FORMATS[name].read(row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _opening(example: Example | Text) -> str:
    """The first words of a row, to recognise it by."""
    if isinstance(example, Text):
        return example.pieces[0][0]
    return next((message.content for message in example.messages if message.content.strip()), "")
