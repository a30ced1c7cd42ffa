"""Measure what training a model costs here: tokens a second, and what holds memory at the peak of a step.

A few steps on random ids, of the model in model.path or of random weights in a published shape, made on the device:
burnish bench model.shape=llama-2-7b model.storage=nf4. Nothing is trained or written.

compare=[full,lora,qlora,dpo] measures one after the other and puts them into one table; what does not fit is left out
of it with the reason.
"""

import json
import math
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from burnish.config import ConfigError, Settings, Stopped, build, nearest_name
from burnish.engine.preflight import check_device, cuda_device_count
from burnish.engine.start import Start
from burnish.model.families import DecoderConfig, find_model, read_config
from burnish.model.shapes import SHAPES
from burnish.report.costs import Row, cost_lines, values
from burnish.report.results import method_name
from burnish.report.units import size
from burnish.settings import AdapterSettings, ModelSettings, OptimSettings, RunSettings, TrainingSettings, memory_bytes

if TYPE_CHECKING:
    from burnish.engine.mesh import Mesh

LENGTH = 2048
SHARE = 0.95
"""Of a cap, what the plan may count on: unused parts of what the allocator holds are under the cap as well."""
STORAGES = {"full": ("full", "none"), "full16": ("full16", "none"), "lora": ("bf16", "lora"), "qlora": ("nf4", "lora")}
"""What a word of `compare` puts in place of model.storage and adapter.kind; `sft` and `dpo` are for `method`."""
IDLE = {"model": ("template",), "run": ("folder", "epochs", "step_tokens")}
"""Settings that would do nothing here."""


class ShapeSettings(ModelSettings):
    """Which model, and how its weights are kept."""

    shape: str | None = Field(
        default=None, description=f"Random weights in a published shape, in place of model.path: {', '.join(SHAPES)}."
    )

    @field_validator("shape")
    @classmethod
    def _known(cls, given: str | None) -> str | None:
        if given is not None and given not in SHAPES:
            nearest = nearest_name(given, list(SHAPES))
            hint = f"did you mean {nearest}?" if nearest else f"write one of {', '.join(SHAPES)}, or model.path=DIR"
            raise ValueError(f"model.shape={given} is not known: {hint}")
        return given

    @model_validator(mode="after")
    def _one_model(self) -> "ShapeSettings":
        if self.shape is not None and "path" in self.model_fields_set:
            raise ValueError(f"model.shape={self.shape} and model.path={self.path} are two models: leave one out")
        return self


class Config(Settings):
    """Which model and method, on how much at a time."""

    model: ShapeSettings = ShapeSettings.model_construct()
    adapter: AdapterSettings = AdapterSettings.model_construct()
    optim: OptimSettings = OptimSettings.model_construct()
    run: RunSettings = RunSettings.model_construct()
    method: Literal["sft", "dpo"] = Field(default="sft", description="How it learns; `dpo` from pairs of answers.")
    compare: tuple[Literal["full", "full16", "lora", "qlora", "sft", "dpo"], ...] = Field(
        default=(), description="Several, one after the other, each with model.storage, adapter.kind or method changed."
    )
    length: int | None = Field(
        default=None,
        ge=4,
        description=f"Tokens of a sequence; none: {LENGTH}, or what the model takes. A pair shares half of them.",
    )
    sequences: int = Field(default=1, ge=1, description="Sequences a step; with method=dpo, pairs.")
    cap: str | None = Field(
        default=None,
        description="A limit on the memory of a CUDA device, as in 48GB, beyond which there is none; the plan keeps to "
        "it unless run.memory says otherwise.",
    )

    @field_validator("cap")
    @classmethod
    def _amount(cls, given: str | None) -> str | None:
        if given is not None:
            _cap_bytes(given)
        return given

    @model_validator(mode="after")
    def _does_something(self) -> "Config":
        for group, names in IDLE.items():
            for name in sorted(getattr(self, group).model_fields_set & set(names)):
                raise ValueError(f"{group}.{name} does nothing in a measurement: leave it out")
        if self.run.steps == 0:
            raise ValueError("run.steps=0 times nothing: write 1 or more, or leave it out")
        return self


def main(config: Config, as_json: bool) -> None:
    """Prints the table; raises ValueError when nothing could be measured."""
    try:
        _bench(config, as_json)
    except KeyboardInterrupt:
        raise Stopped("stopped; nothing is kept of a measurement") from None


def _bench(config: Config, as_json: bool) -> None:
    check_device(config.run.device)
    if config.cap is not None and (config.run.device == "cpu" or cuda_device_count() == 0):
        raise ValueError(f"cap={config.cap}: only the memory of a CUDA device can be capped; leave it out on a CPU")
    with _folder_of(config.model) as folder:
        about = read_config(folder)
        length = _length(config, about)
        rows = [_row(config, word, length, folder) for word in config.compare or ("",)]
        if any(row.settings for row in rows):
            rows = _measured(config, rows, folder, length)
        if not any(row.cost for row in rows):
            raise ValueError("; ".join(f"{row.name}: {row.problem}" if config.compare else row.problem for row in rows))
        about_all = _about(config, folder, length)
        if as_json:
            print(json.dumps(about_all | {"rows": [values(row) for row in rows]}))
        else:
            print("\n".join(cost_lines(about_all, rows)))


@contextmanager
def _folder_of(model: ShapeSettings) -> Generator[Path]:
    """The folder of the model, or one with nothing in it but the config.json of a shape."""
    if model.shape is None:
        yield find_model(model.path, model.revision)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[model.shape]), encoding="utf-8")
        yield Path(folder)


def _length(config: Config, about: DecoderConfig) -> int:
    """Tokens of a sequence. Raises ValueError where a model that is read was not made for as many."""
    if config.length is None:
        return min(LENGTH, about.max_positions)
    if config.length > about.max_positions and config.model.shape is None:
        raise ValueError(
            f"length={config.length}: the model in {config.model.path} is made for {about.max_positions} tokens: "
            f"write length={about.max_positions}"
        )
    return config.length


def _row(config: Config, word: str, length: int, folder: Path) -> Row:
    """What a word of `compare` asks for; the empty word: what the other settings ask for."""
    method: Literal["sft", "dpo"] = "dpo" if word == "dpo" else "sft" if word == "sft" else config.method
    groups = {
        name: getattr(config, name).model_dump(exclude_unset=True) for name in ("model", "adapter", "optim", "run")
    }
    model, run = groups["model"], groups["run"]
    model |= {"path": str(folder)} | ({"init": "random"} if model.pop("shape", None) else {})
    if word in STORAGES:
        model["storage"], groups["adapter"]["kind"] = STORAGES[word]
    if config.cap is not None:
        run = {"memory": f"{_cap_bytes(config.cap) * SHARE / 1e6:.0f}MB"} | run
    unit = _unit(method, length)
    together = min(config.sequences, run.get("microbatch_tokens", config.sequences * unit) // unit)
    groups["run"] = run | {"microbatch_tokens": max(2, together * unit), "step_tokens": config.sequences * unit}
    try:
        if not together:
            asked = run["microbatch_tokens"]
            raise ConfigError(f"run.microbatch_tokens={asked} is less than the {unit} tokens of one: write {unit}")
        settings = build(TrainingSettings, groups)
    except ConfigError as error:
        return Row(word or "asked", method, None, str(error))
    learned = "DPO" if method == "dpo" else ""
    return Row(word or method_name(settings.model.storage, settings.adapter.kind, learned), method, settings)


def _unit(method: str, length: int) -> int:
    """Tokens that are computed for one sequence, or for one pair.

    Half of a pair is shared and computed once, but for its last token: what follows that differs.
    """
    return length if method == "sft" else 2 * length - (length // 2 - 1)


def _measured(config: Config, rows: Sequence[Row], folder: Path, length: int) -> list[Row]:
    """The rows with what each costs, or why it could not be measured."""
    import torch

    from burnish.engine.memory import capped
    from burnish.engine.mesh import Mesh, device_kind

    kind = device_kind(config.run.device)
    mesh = Mesh(torch.device(kind, 0) if kind == "cuda" else torch.device(kind))
    found: list[Row] = []
    with capped(mesh.device, None if config.cap is None else _cap_bytes(config.cap)):
        for number, row in enumerate(rows, start=1):
            if row.settings is not None:
                print(f"[{number}/{len(rows)}] {row.name}", file=sys.stderr)
                row = _with_cost(row, row.settings, config, Start(folder), length, mesh)
            found.append(row)
    return found


def _with_cost(row: Row, settings: TrainingSettings, config: Config, start: Start, length: int, mesh: "Mesh") -> Row:
    """The row with what it costs, or with one line that says why that is not known."""
    from burnish.engine.learner import NonFinite
    from burnish.engine.memory import in_use
    from burnish.engine.room import ran_out
    from burnish.engine.trial import Trial, let_go, try_out

    together = settings.run.microbatch_tokens // _unit(row.method, length)
    trial = Trial(row.method, length, config.sequences, together)
    try:
        return row._replace(cost=try_out(start, settings, trial, mesh))
    except NonFinite as error:
        return row._replace(problem=f"the {error.quantity} of step {error.step + 1} is not finite: lower optim.lr")
    except ValueError as error:
        return row._replace(problem=" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        if not (ran_out(error) or isinstance(error, MemoryError)):
            raise
        less = ", ".join(_needing_less(settings, config.sequences, length))
        return row._replace(problem=f"out of memory with {size(in_use(mesh.device))} in use; less is needed by {less}")
    finally:
        let_go(mesh.device)


def _needing_less(settings: TrainingSettings, sequences: int, length: int) -> list[str]:
    """What to write in place of the settings that were too much."""
    candidates = {
        f"sequences={sequences // 2}": sequences > 1,
        f"length={length // 2}": True,
        "run.memory=least": settings.run.memory != "least",
        "model.storage=nf4": settings.model.storage in ("bf16", "fp32"),
        "model.storage=full16": settings.model.storage == "full",
        "optim.kind=adamw8bit": settings.optim.kind == "adamw",
    }
    return [word for word, helps in candidates.items() if helps]


def _about(config: Config, folder: Path, length: int) -> dict[str, Any]:
    """What all rows have in common."""
    import torch

    from burnish.engine.mesh import device_kind
    from burnish.model.checkpoint import weight_shapes

    about = read_config(folder)
    on_cuda = device_kind(config.run.device) == "cuda"
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name(0) if on_cuda else f"CPU with {threads} thread{'s' * (threads > 1)}"
    return {
        "model": config.model.shape or config.model.path,
        "random": config.model.shape is not None or config.model.init == "random",
        "layers": len(about.layers),
        "width": about.hidden_size,
        "parameters": sum(math.prod(shape) for shape in weight_shapes(about).values()),
        "device": device,
        "cap": config.cap,
        "length": length,
        "sequences": config.sequences,
    }


def _cap_bytes(cap: str) -> int:
    """The bytes that a cap names. Raises ValueError where it names none."""
    try:
        found = memory_bytes(cap)
    except ValueError:
        found = None
    if found is None:
        raise ValueError(f"cap={cap} is no amount: write one such as 48GB or 44.5GiB")
    return found
