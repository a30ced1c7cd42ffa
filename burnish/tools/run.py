"""Run a pipeline: stages that are a recipe each, one after another, the later on what the earlier left.

A pipeline file says `folder: runs/mine` and `stages:`, a mapping of names to a `recipe:` and its settings. A stage
names an earlier one where a run is wanted: `from: sft`, `reward: {path: reward}`. What stands under `shared:` holds
for every stage whose recipe has such a setting. Words change the file: stages.dpo.beta=0.2.

The same command goes on where it was stopped or killed, inside a stage too, and leaves alone what is done. A stage
whose settings, files or earlier stages have changed runs anew; what it left is kept beside it as NAME.before-1.
"""

import contextlib
import gc
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, model_validator

import burnish.recipes
from burnish.config import ConfigError, Settings, Stopped, build, fields, nearest_name
from burnish.data.files import read_rows
from burnish.data.reading import is_remote
from burnish.engine.preflight import check_device, check_text
from burnish.engine.trackers import check_trackers
from burnish.model.families import find_model, read_config
from burnish.report.lineage import contents, differences, facts, left, read_lineage, write_lineage
from burnish.report.settings import flat
from burnish.settings import TrainingSettings

NOISE = {"run.folder", "save.resume", "save.every", "save.keep", "save.log_every", "save.trackers"}
"""Settings that do not change what a stage comes to."""
EXAMPLE = "stages: {sft: {recipe: sft}, dpo: {recipe: dpo, from: sft}}"


class Config(Settings):
    """A pipeline: what runs, in which order, and where."""

    folder: str = Field(min_length=1, description="Where the stages, their lineage and one report are written.")
    shared: dict[str, Any] = Field(
        default_factory=dict, description="Settings of every stage whose recipe has them; a stage's own count more."
    )
    stages: dict[str, Any] = Field(description="Name -> {recipe: NAME, and that recipe's settings}, in order.")
    keep_checkpoints: bool = Field(
        default=False, description="Keep the checkpoints of stages that are done; else only what they trained."
    )

    @model_validator(mode="before")
    @classmethod
    def _needs_stages(cls, given: Any) -> Any:
        if isinstance(given, dict) and not (isinstance(given.get("stages"), dict) and given["stages"]):
            raise ValueError(f"a pipeline has stages: write `{EXAMPLE}` into a .yaml file and name it")
        return given


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


Decision = tuple[Literal["done", "run", "resume"], str]


def main(config: Config, as_json: bool) -> None:
    """Runs the stages that are not done, writes lineage.json and the report, and prints the table of all stages."""
    stages, folder = read_stages(config), Path(config.folder)
    for stage in stages:
        with _told_of(stage.name):
            _check(stage)
    main_rank = os.environ.get("RANK", "0") == "0"
    lineage = _open_lineage(folder, stages) if main_rank else {}
    try:
        for number, stage in enumerate(stages, start=1):
            action, says = _agreed(stage, folder, lineage)
            if main_rank:
                print(f"[{number}/{len(stages)}] {stage.name}: {says}", file=sys.stderr)
            if action != "done":
                _run(stage, resume=action == "resume")
            if main_rank:
                _close(stage, folder, lineage, config.keep_checkpoints)
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on where it last saved") from None
    if main_rank:
        _report(stages, folder, as_json)


def read_stages(config: Config) -> list[Stage]:
    """The stages of a pipeline, in order. Raises ConfigError, which names the stage, for whatever is wrong."""
    drafts = {name: _draft(name, tree, config.stages) for name, tree in config.stages.items()}
    _share(config.shared, drafts)
    references = {name: _references(draft, drafts) for name, draft in drafts.items()}
    stages: dict[str, Stage] = {}
    known: dict[str, str] = {}
    for name, draft in drafts.items():
        with _told_of(name):
            _check_order(name, references, drafts)
            places = {key: str(Path(config.folder, stage)) for key, stage in references[name].items()}
            settings = build(
                draft.schema, _nested({**draft.settings, **places, "run.folder": str(Path(config.folder, name))})
            )
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
    with _told_of(name):
        if not re.fullmatch(r"\w[\w-]*", name):
            raise ConfigError("a stage's name is its folder's: letters, digits, - and _")
        if not isinstance(tree, dict) or "recipe" not in tree:
            others = [other for other, its in stages.items() if isinstance(its, dict) and "recipe" in its]
            meant = nearest_name(name, others)
            hint = f"; did you mean stage '{meant}'?" if meant else ""
            raise ConfigError(f"it has no recipe: write recipe: {'|'.join(recipes)}{hint}")
        own = cast(dict[str, Any], tree)
        recipe = str(own["recipe"])
        if recipe not in recipes:
            meant = nearest_name(recipe, recipes)
            hint = f"did you mean '{meant}'?" if meant else f"there are {', '.join(recipes)}"
            raise ConfigError(f"there is no recipe '{recipe}'; {hint}")
        schema = importlib.import_module(f"burnish.recipes.{recipe}").Config
        settings = _flat({key: value for key, value in own.items() if key != "recipe"}, schema)
        for key in ("run.folder", "save.resume"):
            if key in settings:
                raise ConfigError(f"{key} is for the pipeline to say: leave it out")
        return _Draft(name, recipe, schema, settings)


def _flat(tree: Mapping[str, Any], schema: type[Settings], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, however deep they were written; a setting that is a mapping itself stays whole."""
    kinds = {key: kind for key, kind, *_ in fields(schema)}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in kinds:
            found |= _flat(cast(dict[str, Any], value), schema, f"{name}.")
        else:
            found[name] = None if value == "none" and "none" in kinds.get(name, "") else value
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
        place[last] = value
    return tree


def _share(shared: Mapping[str, Any], drafts: Mapping[str, _Draft]) -> None:
    """Put the shared settings below the stages' own, where the recipe has them. Raises for one that no recipe has."""
    taken, every = set[str](), dict[str, str]()
    for draft in drafts.values():
        known = {key for key, *_ in fields(draft.schema)}
        for name, value in _flat(shared, draft.schema).items():
            every[name] = nearest_name(name, sorted(known)) or every.get(name, "")
            if name in known:
                taken.add(name)
                # A stage that starts from another has that one's base.
                if not ("from" in draft.settings and name in ("model.path", "model.revision")):
                    draft.settings.setdefault(name, value)
    for name in (name for name in every if not any(f"{name}.".startswith(f"{key}.") for key in taken)):
        hint = f"did you mean '{every[name]}'?" if every[name] else "`burnish RECIPE --help` lists the keys"
        raise ConfigError(f"shared: no stage's recipe has the setting '{name}'; {hint}")


def _references(draft: _Draft, drafts: Mapping[str, _Draft]) -> dict[str, str]:
    """Which settings name a stage. Raises ConfigError for a name that is neither a stage's nor a place on the disk."""
    found: dict[str, str] = {}
    for key, value in draft.settings.items():
        group, _, last = key.rpartition(".")
        if key != "from" and (last != "path" or group in ("", "model", "data", "evaluate")):
            continue
        if value in drafts:
            found[key] = str(value)
        elif value is not None and "/" not in str(value) and not Path(str(value)).exists() and value != "embedded":
            meant = nearest_name(str(value), [name for name in drafts if name != draft.name])
            hint = f"did you mean '{meant}'?" if meant else f"the stages are {', '.join(drafts)}"
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


def _check(stage: Stage) -> None:
    """Raises ValueError for what can be known to be wrong before the stages above have run; imports no torch."""
    config = stage.config
    check_device(config.run.device)
    check_text(config.evaluate.general)
    check_trackers(config.save.trackers)
    if config.from_ is None:
        read_config(find_model(config.model.path, config.model.revision))
    elif "from" not in stage.references and not Path(config.from_).exists():
        raise ValueError(f"from={config.from_}: there is no such folder, and no stage of this name")
    paths = (config.data.path,) if isinstance(config.data.path, str) else config.data.path
    for path in filter(None, (*paths, config.evaluate.path)):
        if path != "embedded" and not is_remote(path):
            next(read_rows(path, config.data.split if path in paths else "train"), None)


def _open_lineage(folder: Path, stages: list[Stage]) -> dict[str, Any]:
    """What is known of earlier runs. Raises ValueError where something is in the way that no pipeline has made."""
    lineage = read_lineage(folder)
    ours = [] if lineage else [folder / name for name in ("config.yaml", "results.json", "report.html", "table.md")]
    for path in (*ours, *(stage.folder for stage in stages if stage.name not in lineage)):
        if path.exists():
            raise ValueError(
                f"{path} is in the way and was not made by this pipeline: write folder=DIR with a new path"
            )
    return lineage


def _agreed(stage: Stage, folder: Path, lineage: dict[str, Any]) -> Decision:
    """What is to be done about a stage: the main rank decides, and all ranks hear of it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return _decide(stage, folder, lineage)
    from burnish.engine.mesh import open_mesh

    with open_mesh(stage.config.run.device) as mesh:
        return cast(Decision, mesh.collect(_decide(stage, folder, lineage) if mesh.is_main else None)[0])


def _decide(stage: Stage, folder: Path, lineage: dict[str, Any]) -> Decision:
    """Whether a stage is done, goes on or starts; in the last two cases its folder is ready and it is noted."""
    entry, says = lineage.get(stage.name, {}), f"{stage.recipe}, in {stage.folder}"
    if stage.folder.exists():
        if entry["key"] != stage.key:
            aside = _set_aside(stage.folder)
            changed = "; ".join(differences(entry["inputs"], stage.inputs))
            says += f", anew: {changed} changed. What it left before is now {aside}"
        elif "ended" in entry and (stage.folder / "results.json").exists():
            return "done", f"done before, in {stage.folder}"
        elif (stage.folder / "config.yaml").exists():
            return "resume", f"{says}, goes on where it last saved"
        else:
            shutil.rmtree(stage.folder)  # killed before it had written anything
    lineage[stage.name] = {"recipe": stage.recipe, "key": stage.key, "began": _now(), "inputs": dict(stage.inputs)}
    write_lineage(folder, lineage)
    return "run", says


def _set_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    return folder.rename(aside)


def _run(stage: Stage, resume: bool) -> None:
    """Run a stage to its end; what it prints goes to stderr, and the memory that it held is given back."""
    saving = stage.config.save.model_copy(update={"resume": resume})
    try:
        with _told_of(stage.name), contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(f"burnish.recipes.{stage.recipe}")
            module.main(stage.config.model_copy(update={"save": saving}))
    except Stopped as stopped:
        what = str(stopped).partition(";")[0]
        raise Stopped(f"stage '{stage.name}': {what}; the same command goes on from there") from None
    finally:
        _release()


def _release() -> None:
    """Forget what the stage before has left in memory, code that was compiled for its model included."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if "torch._dynamo" in sys.modules:  # a second of import, for nothing where nothing was compiled
            torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _close(stage: Stage, folder: Path, lineage: dict[str, Any], keep_checkpoints: bool) -> None:
    """Note what a stage that is done has left, and delete what no one needs any more."""
    entry = lineage[stage.name]
    if "ended" not in entry:
        entry |= {"ended": _now(), "from": dict(stage.references), "settings": f"{stage.name}/config.yaml"}
        entry |= {**facts(stage.folder), "left": left(stage.folder)}
        write_lineage(folder, lineage)
    if not keep_checkpoints:
        shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)


def _report(stages: list[Stage], folder: Path, as_json: bool) -> None:
    from burnish.report.results import compare, show

    rows = compare([stage.folder for stage in stages], folder)
    if as_json:
        print(json.dumps({"stages": rows, "report": str(folder / "report.html")}, ensure_ascii=False))
    else:
        show(rows, folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _told_of(name: str) -> Generator[None]:
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
