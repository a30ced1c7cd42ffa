"""From data.path to clean rows: read, recognise, repair, and say where each stands. Imports no torch."""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar

from burnish.data.answers import Compared, answers_of, repair_answers
from burnish.data.audit import Tally
from burnish.data.files import EMBEDDED, READERS, Row, read_rows
from burnish.data.formats import FORMATS, Reading, announce, check_format, disagreement, recognise, task_of
from burnish.data.hub import is_hub_id
from burnish.data.repair import repair
from burnish.settings import DataSettings
from burnish.types import Example, Judged, Preference, Prompt, Text

Said = TypeVar("Said", bound=Reading)

SAMPLE = 100
"""Rows that the format is recognised from; every further row is checked against it."""


@dataclass(frozen=True, slots=True)
class Source(Generic[Said]):
    """A row as it was read: what it says, and where it stands."""

    row: int
    place: str
    example: Said
    task: str | None


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a data set after reading and repair."""

    format: str
    reading: str
    """How they were read, in words."""
    count: int
    """Rows before repair."""
    sources: list[Source[Example | Text]] = field(default_factory=list[Source[Example | Text]])
    prompts: list[Source[Prompt]] = field(default_factory=list[Source[Prompt]])
    """Rows without an answer to train on."""
    compared: list[Source[Compared]] = field(default_factory=list[Source[Compared]])
    """Rows that say which answers are wanted."""


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
    read = Rows(name, announce(name, [row for _, row in rows[:SAMPLE]]), len(rows))
    for number, (place, row) in enumerate(rows):
        reading = _read(name, place, row)
        if isinstance(reading, Prompt):
            read.prompts.append(Source(number, place, reading, reading.task))
            continue
        compared = isinstance(reading, Preference | Judged)
        result = repair_answers(reading) if compared else repair(reading, exported=name == "sharegpt")
        clean = result.example
        if result.rules and not data.repair:
            dropped.add(result.rules[0], number, place, _opening(reading))
        elif clean is None:
            assert result.dropped is not None
            dropped.add(result.dropped, number, place, _opening(reading))
        else:
            for rule in result.rules:
                repaired.add(rule, number, place, _opening(reading))
            if isinstance(clean, Preference | Judged):
                read.compared.append(Source(number, place, clean, task_of(row)))
            else:
                read.sources.append(Source(number, place, clean, task_of(row)))
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


def format_of(data: DataSettings) -> str:
    """The name of the format that the rows have, from the first of them. Raises ValueError as `check_data` does."""
    rows = list(read_rows(data.path, data.split, min(SAMPLE, data.limit or SAMPLE)))
    if not rows:
        raise ValueError(f"{joined(data.path)} holds no rows")
    check_format(data.format)
    return _format_of(rows, data.format)


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


def _opening(example: Example | Text | Compared) -> str:
    """The first words of a row, to recognise it by."""
    if isinstance(example, Text):
        return example.pieces[0][0]
    messages = example.messages if isinstance(example, Example) else (*example.prompt, *chain(*answers_of(example)))
    return next((message.content for message in messages if message.content.strip()), "")
