"""From a pipeline's file to its stages, each with its recipe's settings, or to one line that says what is wrong.

Imports no torch.
"""

import contextlib
import hashlib
import importlib
import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import burnish.recipes
from burnish.config import ConfigError, Settings, build, fields, nearest_name
from burnish.data.files import read_rows
from burnish.data.reading import is_remote
from burnish.engine.preflight import check_device, check_text
from burnish.engine.trackers import check_trackers
from burnish.model.families import find_model, read_config
from burnish.pipelines.lineage import contents
from burnish.report.settings import flat
from burnish.sampling.scoring import check_reward
from burnish.settings import ReinforcementSettings, TrainingSettings

NOISE = {"run.folder", "save.resume", "save.every", "save.keep", "save.log_every", "save.trackers"}
"""Settings that do not change what a stage comes to."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One recipe's run."""

    name: str
    recipe: str
    config: TrainingSettings
    references: Mapping[str, str]
    """Setting -> the earlier stage that it names."""
    inputs: Mapping[str, Any]
    """Whatever its result depends on: settings, the content of files, the keys of earlier stages."""

    @property
    def key(self) -> str:
        """A hash of the inputs."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return Path(self.config.run.folder)


def read_stages(folder: Path, shared: Mapping[str, Any], trees: Mapping[str, Any]) -> list[Stage]:
    """The stages of a pipeline, in order; `trees` are their settings as the file has them, by name.

    Raises ConfigError, which names the stage, for whatever is wrong.
    """
    drafts = {name: _draft(name, tree, trees) for name, tree in trees.items()}
    _share(shared, drafts)
    references = {name: _references(draft, drafts) for name, draft in drafts.items()}
    stages: dict[str, Stage] = {}
    known: dict[str, str] = {}
    for name, draft in drafts.items():
        with told_of(name):
            _check_order(name, references, drafts)
            places = {key: str(folder / stage) for key, stage in references[name].items()}
            settings = build(draft.schema, _nested({**draft.settings, **places, "run.folder": str(folder / name)}))
            earlier = {key: stages[stage] for key, stage in references[name].items()}
            inputs = _inputs(draft.recipe, settings, earlier, known)
            stages[name] = Stage(name, draft.recipe, settings, references[name], inputs)
    return list(stages.values())


@dataclass(frozen=True, slots=True)
class _Draft:
    """A stage as the file has it."""

    name: str
    recipe: str
    schema: type[TrainingSettings]
    settings: dict[str, Any]
    """By dotted name."""


def _draft(name: str, tree: Any, stages: Mapping[str, Any]) -> _Draft:
    recipes = sorted(path.stem for path in Path(burnish.recipes.__path__[0]).glob("[a-z]*.py"))
    with told_of(name):
        if not re.fullmatch(r"\w[\w-]*", name):
            raise ConfigError("a stage's name is its folder's: letters, digits, - and _")
        if not isinstance(tree, dict) or "recipe" not in tree:
            others = [other for other, its in stages.items() if isinstance(its, dict) and "recipe" in its]
            hint = _meant(name, others, "`burnish RECIPE --help` lists its settings")
            raise ConfigError(f"it has no recipe: write recipe: {'|'.join(recipes)}; {hint}")
        own = cast(dict[str, Any], tree)
        recipe = str(own["recipe"])
        if recipe not in recipes:
            hint = _meant(recipe, recipes, f"there are {', '.join(recipes)}")
            raise ConfigError(f"there is no recipe '{recipe}'; {hint}")
        schema = importlib.import_module(f"burnish.recipes.{recipe}").Config
        settings = _flat({key: value for key, value in own.items() if key != "recipe"}, schema)
        for key in ("run.folder", "save.resume"):
            if key in settings:
                raise ConfigError(f"{key} is for the pipeline to say: leave it out")
        return _Draft(name, recipe, schema, settings)


def _flat(tree: Mapping[str, Any], schema: type[Settings], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, however deep they were written; a setting that is a mapping itself stays whole.

    Raises ConfigError for one that is given both dotted and in its group.
    """
    kinds = {key: kind for key, kind, *_ in fields(schema)}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in kinds:
            inner = _flat(cast(dict[str, Any], value), schema, f"{name}.")
        else:
            inner = {name: None if value == "none" and kinds.get(name, "").endswith(" or none") else value}
        if both := sorted(found.keys() & inner.keys()):
            group = both[0].rpartition(".")[0]
            raise ConfigError(f"'{both[0]}' is given twice, in the group '{group}' and dotted: leave one out")
        found |= inner
    return found


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name as the groups that they are in."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *groups, last = name.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError(f"'{group}' is a group of settings: write {name} beside its others")
        if last in place:
            raise ConfigError(f"'{name}' is a group of settings, and some of them are given dotted: leave it out")
        place[last] = value
    return tree


def _share(shared: Mapping[str, Any], drafts: Mapping[str, _Draft]) -> None:
    """Put the shared settings below the stages' own, where the recipe has them. Raises for one that no recipe has."""
    taken, every, keys = set[str](), set[str](), list[str]()
    for draft in drafts.values():
        keys += (known := [key for key, *_ in fields(draft.schema)])
        try:
            settings = _flat(shared, draft.schema)
        except ConfigError as error:
            raise ConfigError(f"shared: {error}") from None
        for name, value in settings.items():
            every.add(name)
            if name in known:
                taken.add(name)
                # A stage that starts from another has that one's base.
                if not ("from" in draft.settings and name in ("model.path", "model.revision")):
                    draft.settings.setdefault(name, value)
    for name in sorted(name for name in every if not any(f"{name}.".startswith(f"{key}.") for key in taken)):
        hint = _meant(name, keys, "`burnish RECIPE --help` lists the keys")
        raise ConfigError(f"shared: no stage's recipe has the setting '{name}'; {hint}")


def _meant(name: str, known: Sequence[str], otherwise: str) -> str:
    """The end of a message about a name that is not known."""
    nearest = nearest_name(name, known)
    return f"did you mean '{nearest}'?" if nearest else otherwise


def _references(draft: _Draft, drafts: Mapping[str, _Draft]) -> dict[str, str]:
    """Which settings name a stage. Raises ConfigError for a name that is neither a stage's nor a place on the disk."""
    found: dict[str, str] = {}
    for key, value in draft.settings.items():
        group, _, last = key.rpartition(".")
        if key != "from" and (last != "path" or group in ("", "model", "data", "evaluate")):
            continue
        if isinstance(value, list | dict):
            continue  # not a name: the recipe's own validation says so
        if value in drafts:
            found[key] = str(value)
        elif value is not None and "/" not in str(value) and not Path(str(value)).exists() and value != "embedded":
            others = [name for name in drafts if name != draft.name]
            hint = _meant(str(value), others, f"the stages are {', '.join(drafts)}")
            raise ConfigError(f"stage '{draft.name}': {key}: there is no stage and no folder '{value}'; {hint}")
    return found


def _check_order(name: str, references: Mapping[str, Mapping[str, str]], drafts: Mapping[str, _Draft]) -> None:
    """Raises ConfigError where a stage refers to itself, to a later one, in a circle, or to one of the wrong kind."""
    order = list(drafts)
    for key, stage in references[name].items():
        if stage == name:
            raise ConfigError(f"{key}={stage} is this stage itself: name one above it")
        if order.index(stage) > order.index(name):
            seen, ahead = set[str](), [stage]
            while ahead:
                seen.add(one := ahead.pop())
                ahead += set(references[one].values()) - seen
            problem = f"and '{stage}' needs this stage: a circle" if name in seen else "a later stage: move it above"
            raise ConfigError(f"{key}={stage} is {problem}")
        scores = drafts[stage].recipe == "reward"
        if key == "from" and scores:
            raise ConfigError(f"from={stage} is a reward model, which writes no text: name the stage before it")
        if key == "reward.path" and not scores:
            raise ConfigError(f"reward.path={stage} is a stage of recipe {drafts[stage].recipe}, not reward")


def _inputs(
    recipe: str, settings: TrainingSettings, earlier: Mapping[str, Stage], known: dict[str, str]
) -> dict[str, Any]:
    """What a stage's result depends on, so named that two sets of inputs can be compared in words."""
    tree = flat(settings.model_dump(mode="json", by_alias=True))
    plain = {name: value for name, value in tree.items() if name not in NOISE and name not in earlier}
    read = {f"content of {name}": digest for name, digest in contents(plain, known).items()}
    return {"recipe": recipe, **plain, **read, **{f"stage {key}={s.name}": s.key for key, s in earlier.items()}}


def check_stage(stage: Stage) -> None:
    """Raises ValueError for what can be known to be wrong before the stages above have run; imports no torch."""
    config = stage.config
    check_device(config.run.device)
    check_text(config.evaluate.general)
    check_trackers(config.save.trackers)
    if isinstance(config, ReinforcementSettings) and "reward.path" not in stage.references:
        check_reward(config.reward)
    if config.from_ is None:
        read_config(find_model(config.model.path, config.model.revision))
    elif "from" not in stage.references and not Path(config.from_).exists():
        raise ValueError(f"from={config.from_}: there is no such folder, and no stage of this name")
    paths = (config.data.path,) if isinstance(config.data.path, str) else config.data.path
    for path in filter(None, (*paths, config.evaluate.path)):
        if path != "embedded" and not is_remote(path):
            next(read_rows(path, config.data.split if path in paths else "train"), None)


@contextlib.contextmanager
def told_of(name: str) -> Generator[None]:
    """Errors of a stage begin with its name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"stage '{name}': {error}") from error
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        raise OSError(f"stage '{name}': {text}") from error
    except ValueError as error:
        raise ValueError(f"stage '{name}': {error}") from error
    except MemoryError as error:
        raise (MemoryError(f"stage '{name}': {error}") if str(error) else error) from error
