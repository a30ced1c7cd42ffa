"""Run a pipeline: stages that are a recipe each, one after another, the later on what the earlier left.

A pipeline file says `folder: runs/mine` and `stages:`, a mapping of names to a `recipe:` and its settings. A stage
names an earlier one where a run is wanted: `from: sft`, `reward: {path: reward}`. What stands under `shared:` holds
for every stage whose recipe has such a setting. Words change the file: stages.dpo.beta=0.2.

The same command goes on where it was stopped or killed, inside a stage too, and leaves alone what is done. A stage
whose settings, files or earlier stages have changed runs anew; what it left is kept beside it as NAME.before-1.
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import sys
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from burnish.config import Settings, Stopped
from burnish.pipelines.lineage import differences, facts, left, read_lineage, write_lineage
from burnish.pipelines.stages import Stage, check_stage, read_stages, told_of

if TYPE_CHECKING:
    from burnish.engine.mesh import Mesh


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
            example = "stages: {sft: {recipe: sft}, dpo: {recipe: dpo, from: sft}}"
            raise ValueError(f"a pipeline has stages: write `{example}` into a .yaml file and name it")
        return given


Decision = tuple[Literal["done", "run", "resume"], str]


def main(config: Config, as_json: bool) -> None:
    """Runs the stages that are not done, writes lineage.json and the report, and prints the table of all stages."""
    folder = Path(config.folder)
    stages = read_stages(folder, config.shared, config.stages)
    for stage in stages:
        with told_of(stage.name):
            check_stage(stage)
    with _several_ranks(stages) as mesh:
        main_rank = mesh is None or mesh.is_main
        lineage = _open_lineage(folder, stages) if main_rank else {}
        try:
            for number, stage in enumerate(stages, start=1):
                action, says = _agreed(mesh, stage, folder, lineage)
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


@contextlib.contextmanager
def _several_ranks(stages: list[Stage]) -> Generator["Mesh | None"]:
    """The mesh of all ranks, for all stages together; None where there is one rank, and torch need not be loaded."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    from burnish.engine.mesh import device_kind, open_mesh

    if len(kinds := {device_kind(stage.config.run.device) for stage in stages}) > 1:
        raise ValueError("on several ranks all stages need the same run.device: write it under shared")
    with open_mesh(kinds.pop()) as mesh:
        yield mesh


def _agreed(mesh: "Mesh | None", stage: Stage, folder: Path, lineage: dict[str, Any]) -> Decision:
    """What is to be done about a stage: the main rank decides, and all hear of it."""
    if mesh is None:
        return _decide(stage, folder, lineage)
    return mesh.collect(_decide(stage, folder, lineage) if mesh.is_main else None)[0]


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
        with told_of(stage.name), contextlib.redirect_stdout(sys.stderr):
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
