"""From a YAML file and key=value words to one validated and frozen object.

Every recipe and tool declares a `Settings` class and is given what `parse` makes of the command line. A key that does
not exist, a value of the wrong kind and two settings that contradict each other are found here, before torch loads.
"""

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


class Settings(BaseModel):
    """A frozen group of settings; each field carries the sentence that `--help` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Stopped(Exception):
    """The run was asked to stop and has saved itself; the message says how to go on."""


class ConfigError(ValueError):
    """A setting is wrong; the message is one line that names it and says what to write instead."""


class UnknownKey(ConfigError):
    """There is no setting of this name."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


S = TypeVar("S", bound=Settings)


def parse(schema: type[S], words: Sequence[str]) -> S:
    """The settings that a command line asks for: YAML files first, in order, then key=value words over them.

    Raises ConfigError, whose message is one line, for a file that cannot be read, a word that is neither, an unknown
    key (with the nearest known one), a setting that two words or two lines of a file give, a value of the wrong kind,
    or settings that contradict each other.
    """
    tree: dict[str, Any] = {}
    kinds = {key: kind for key, kind, *_ in fields(schema)}
    pairs = [word for word in words if "=" in word and not word.startswith("-")]
    for place, word in enumerate(words):
        if word.endswith((".yaml", ".yml")) and word not in pairs:
            _merge(tree, _in_groups(Path(word), _read_yaml(Path(word)), kinds))
        elif word not in pairs:
            hint = _without_dashes(words[place:], list(kinds)) or "--help lists the keys"
            raise ConfigError(f"'{word}' is neither key=value nor a .yaml file; {hint}")
    for key, value in _read_words(pairs, kinds):
        _put(tree, key, value)
    return build(schema, tree)


def build(schema: type[S], tree: Mapping[str, Any]) -> S:
    """Settings from a nested mapping, with the same one-line errors as `parse`."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "extra_forbidden":
            raise _unknown_key(schema, problem) from None
        raise ConfigError(_explain(schema, problem)) from None


def to_yaml(settings: Settings) -> str:
    """The settings as YAML that `parse` reads back to the same object."""
    return yaml.safe_dump(
        settings.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=120
    )


def fields(schema: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every setting as (dotted key, kind, default, sentence), in the order of the classes."""
    for name, field in schema.model_fields.items():
        kind, name = field.annotation, field.alias or name
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else _show(field.get_default(call_default_factory=True))
            yield prefix + name, _kind_name(kind), default, field.description or ""


def read_value(key: str, text: str) -> Any:
    """What YAML reads in the value of a setting.

    Raises ConfigError where it gives one of its own keys twice, yaml.YAMLError where it cannot be read.
    """
    try:
        return yaml.load(text, _Loader)
    except _Twice as error:
        raise ConfigError(f"{key}={text} gives '{error.key}' twice: leave one out") from None


class _Twice(yaml.YAMLError):
    """A mapping has a key twice."""

    def __init__(self, key: str, first: int, second: int) -> None:
        super().__init__(key)
        self.key, self.lines = key, f"line {first}" if first == second else f"lines {first} and {second}"


class _Loader(yaml.SafeLoader):
    """Reads what SafeLoader reads but for a key given twice, of which that one takes the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # looked at here: later, what << merges stands among the keys
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise _Twice(key.value, lines[name], line)
                lines[name] = line
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(missing("file", path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except _Twice as error:
        raise ConfigError(f"{path}: '{error.key}' is given twice, on {error.lines}: leave one out") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise ConfigError(f"{path} is empty; write `key: value` lines into it")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not a {type(tree).__name__}")
    return tree


def _in_groups(path: Path, tree: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """A file's settings in their groups, those too that it names dotted, as in `run.steps: 6`."""
    dotted = [key for key in tree if key in kinds and "." in key]
    found = {key: value for key, value in tree.items() if key not in dotted}
    for key in dotted:
        group, (*parents, last) = found, key.split(".")
        for parent in parents:
            if not isinstance(group.get(parent, {}), dict):
                raise ConfigError(f"{path}: '{key}': '{parent}' already has a value of its own")
            group[parent] = dict(group.get(parent, {}))  # a copy: an anchor may stand for it elsewhere
            group = group[parent]
        if last in group:
            raise ConfigError(f"{path}: '{key}' is given twice, in its group and dotted: leave one out")
        group[last] = tree[key]
    return found


def _read_words(words: Sequence[str], kinds: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """The settings that key=value words give, by dotted key. Raises ConfigError where two words give the same one."""
    given: dict[str, str] = {}
    for word in words:
        key, _, text = word.partition("=")
        key = key.strip()
        settings = dict(_settings_in(key, _value(kinds.get(key, ""), key, text), kinds))
        for name, (other, before) in itertools.product(settings, given.items()):
            if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                both = min(name, other, key=len)
                raise ConfigError(f"'{both}' is given twice, as {before} and as {key}={text}: leave one out")
        given |= dict.fromkeys(settings, f"{key}={text}")
        yield from settings.items()


def _settings_in(key: str, value: Any, kinds: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """What a word gives: the settings of a group, as in `model={path: x}`, or the one setting that it names."""
    if isinstance(value, dict) and any(name.startswith(f"{key}.") for name in kinds):
        for name, part in cast(dict[Any, Any], value).items():
            yield from _settings_in(f"{key}.{name}", part, kinds)
    else:
        yield key, value


def _value(kind: str, key: str, text: str) -> Any:
    """A word's value: as it stands where text is wanted, else YAML's reading: lists, numbers, true and null."""
    if text in kind.split("|"):  # `off` is a choice here, and false in YAML
        return text
    listed = text.startswith("[") and text.endswith("]")
    if kind.startswith("str") and not (listed and "tuple" in kind):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return None if text in ("none", "null") and "none" in kind else text[1:-1] if quoted else text
    if kind.startswith("tuple") and not listed:
        return [] if text in ("", "none") else text.split(",")
    try:
        return read_value(key, text) if text.strip() else text
    except yaml.YAMLError:
        if listed:
            raise ConfigError(f"'{key}' looks like a list that YAML cannot read: put its items in quotes") from None
        return text


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        if depth:  # a stage's settings may be dotted in its file: `run.steps: 3`
            tree.pop(".".join([*parents[depth:], last]), None)
        if not isinstance(tree.setdefault(parent, {}), dict):
            raise ConfigError(f"'{key}': '{parent}' already has a value of its own")
        tree = tree[parent]
    tree[last] = value


def _merge(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _explain(schema: type[Settings], problem: ErrorDetails) -> str:
    """One line for one problem: the key, what is wrong with it, and what to write instead."""
    known = [key for key, *_ in fields(schema)]
    key, given = _key(problem, known), _show(problem["input"])
    match problem["type"]:
        case "missing":
            return f"'{key}' is required: write {key}=..."
        case "value_error":
            return str(problem.get("ctx", {}).get("error", problem["msg"]))
        case "literal_error":
            choices = problem.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ")
            close = difflib.get_close_matches(given, choices.split(", "), n=1, cutoff=0.7)  # nf5 is not nearly nf4
            return f"'{key}' is one of {choices}, not {given}" + (f"; did you mean '{close[0]}'?" if close else "")
        case _:
            if any(name.startswith(f"{key}.") for name in known):
                return f"'{key}' is a group of settings, not {given}: write {key}.NAME=..."
            kind = next((kind for name, kind, *_ in fields(schema) if name == key), "")
            return f"'{key}' should be {kind or 'different'}, not {given} ({problem['msg'].lower()})"


def _key(problem: ErrorDetails, known: Sequence[str]) -> str:
    """The setting that a problem is about; items and parts of its value are not named."""
    path = [str(part) for part in problem["loc"]]
    return next((k for k in (".".join(path[:n]) for n in range(len(path), 0, -1)) if k in known), ".".join(path))


def _unknown_key(schema: type[Settings], problem: ErrorDetails) -> UnknownKey:
    known = [key for key, *_ in fields(schema)]
    key = _key(problem, known)
    if isinstance(problem["input"], dict) and problem["input"]:
        key = f"{key}.{next(iter(problem['input']))}"  # the group is unknown: name the whole setting
    nearest = nearest_name(key, known)
    hint = f"did you mean '{nearest}'?" if nearest else "--help lists the keys"
    return UnknownKey(f"unknown key '{key}'; {hint}", key)


def _without_dashes(words: Sequence[str], known: Sequence[str]) -> str:
    """How to write the first of these words where it is meant as other programs' `--lr 3`; empty where it is not."""
    if not words[0].startswith("-"):
        return ""
    name, sign, value = words[0].lstrip("-").partition("=")
    if not sign:
        value = next((word for word in words[1:2] if not word.startswith("-") and "=" not in word), "...")
    nearest = nearest_name(name.replace("-", "_"), known)
    return f"settings are written as {nearest}={value}" if nearest else "settings are written as key=value"


def missing(kind: str, path: Path) -> str:
    """One line for a `file` or a `folder` that is not there, with the sibling whose name is nearest.

    A file's siblings are compared without their endings: those alone make no two names alike. Folders are among them
    where the name has no ending, as data may be either.
    """
    folder, named = path.parent, "stem" if kind == "file" else "name"
    siblings = list(folder.iterdir()) if folder.is_dir() else []
    if kind == "folder" or path.suffix:
        siblings = [sibling for sibling in siblings if sibling.is_dir() == (kind == "folder")]
    names = {getattr(sibling, named): sibling.name for sibling in siblings}
    close = difflib.get_close_matches(getattr(path, named), names, n=1)
    if close:
        return f"there is no {kind} {path}; did you mean {folder / names[close[0]]}?"
    return f"there is no {kind} {path}" + ("" if folder.is_dir() else f", nor a folder {folder}")


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """The known dotted name that a mistyped one most likely meant, or None when nothing is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    last = name.rsplit(".", 1)[-1]
    by_ending = {full.rsplit(".", 1)[-1]: full for full in known}
    ending = difflib.get_close_matches(last, list(by_ending), n=1, cutoff=0.5)
    return by_ending[ending[0]] if ending else None


def _kind_name(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    if text.startswith("Literal["):
        return text.removeprefix("Literal[").removesuffix("]").replace("'", "").replace(", ", "|")
    return text.replace(" | None", " or none")


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(str(item) for item in value) + "]"
    return f"'{value}'" if isinstance(value, str) and not value else str(value)
