"""Settings: a YAML file and key=value words in, one validated and frozen object out.

Every recipe and tool declares a `Settings` class and reads it with `parse`. A key that does not exist, a value of the
wrong kind and two settings that contradict each other are all found here, before torch is imported.
"""

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails


class Settings(BaseModel):
    """A frozen group of settings; each field carries the sentence that `--help` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ModelSettings(Settings):
    """Which model, and how its weights are kept."""

    path: str = Field(default="embedded", description="A folder in Hugging Face layout, a hub id, or `embedded`.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    storage: Literal["auto", "full", "bf16", "fp32", "nf4"] = Field(
        default="auto",
        description="How the base weights are kept: `full` trains them (fp32), `bf16` and `fp32` freeze them, "
        "`nf4` freezes them in 4 bits. `auto` is `full` without an adapter, else `bf16`.",
    )
    init: Literal["weights", "random"] = Field(
        default="weights",
        description="`random`: fresh weights from the folder's config.json alone, for pre-training and benchmarks.",
    )
    double_quant: bool = Field(default=True, description="With nf4, keep the scales of the blocks in 8 bits as well.")
    template: str = Field(
        default="auto",
        description="The chat template: `auto` is the tokenizer's own; `chatml`, `alpaca`, `vicuna`, or a .jinja file.",
    )


class TrainedModelSettings(Settings):
    """A model to use: a base, and what was trained on it."""

    path: str | None = Field(
        default=None, description="A model folder, run folder, hub id or `embedded`; none: the adapter's base."
    )
    adapter: str | None = Field(default=None, description="An adapter folder in PEFT's layout, or the folder of a run.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id; none: the adapter's.")
    storage: Literal["auto", "bf16", "fp32", "nf4"] = Field(
        default="auto", description="`auto`: as when the adapter was trained, else bf16."
    )
    template: str = Field(default="auto", description="The chat template; `auto`: the one of training.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto` is cuda where there is one.")
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="Of activations; `auto`: bf16 on cuda, fp32 on cpu."
    )


class AdapterSettings(Settings):
    """The small trained weights beside a frozen base."""

    kind: Literal["auto", "none", "lora", "dora", "ia3"] = Field(
        default="auto",
        description="Which adapter to train. `auto` is `none` when model.storage is `full`, else `lora`.",
    )
    rank: int = Field(default=16, ge=1, description="Rank r of the update B·A.")
    alpha: float = Field(default=32.0, gt=0, description="The update is scaled by alpha / rank.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: str | tuple[str, ...] = Field(
        default="auto",
        description="`all-linear`, a list of layer names or name endings, or one regular expression. `auto` is "
        "`all-linear`, but k_proj, v_proj and down_proj for ia3.",
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="Ranks of single layers: name ending or regular expression -> rank."
    )


class DataSettings(Settings):
    """Which rows, how they are read, and what of them is trained on."""

    path: str | tuple[str, ...] = Field(
        default="embedded",
        min_length=1,
        description="JSONL, JSON or Parquet files, a hub dataset id, or `embedded`; a list is joined.",
    )
    format: str = Field(
        default="auto",
        description="`auto` recognises it from the rows; or alpaca, sharegpt, messages, lima, prompt_completion, "
        "question_answer, text.",
    )
    split: str = Field(default="train", description="The split of a hub dataset.")
    train_on: Literal["all_assistant", "last_assistant", "everything"] = Field(
        default="all_assistant", description="Which turns of a conversation count in the loss."
    )
    max_length: int = Field(
        default=2048, ge=2, description="The longest sequence, in tokens. At most run.microbatch_tokens."
    )
    too_long: Literal["drop", "split", "error"] = Field(
        default="drop", description="What becomes of a longer one. Nothing is ever cut silently; the audit counts them."
    )
    repair: bool = Field(default=True, description="Repair known dirt by named rules; else drop such rows.")
    allow_untrained: bool = Field(default=False, description="Drop rows without a token to train on, do not stop.")
    limit: int | None = Field(default=None, ge=1, description="Read at most so many rows.")


class EvaluateSettings(Settings):
    """What is measured besides the training loss."""

    path: str | None = Field(default=None, description="Held-out rows in any format; none: a share of data.path.")
    fraction: float = Field(default=0.05, ge=0, lt=1, description="The share of rows held out without evaluate.path.")
    every: int = Field(default=0, ge=0, description="Evaluate every so many steps; 0: at the end only.")
    prompts: int = Field(default=0, ge=0, description="Held-out rows to answer by generation and grade.")
    max_tokens: int = Field(default=64, ge=1, description="The longest answer to a prompt, in tokens.")
    general: str | None = Field(default=None, description="Text whose loss is measured: forgetting.")


class OptimSettings(Settings):
    """AdamW and its learning rate."""

    lr: float | None = Field(
        default=None, ge=0, description="Peak learning rate; none: 2e-5 for full weights, 2e-4 for adapters."
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="cosine",
        description="Shape after warm-up; `wsd` is constant, then linear to 0 over the last `decay` of the steps.",
    )
    warmup: float = Field(default=0.03, ge=0, description="Warm-up steps; below 1 a share of all steps.")
    decay: float = Field(default=0.2, gt=0, le=1, description="With wsd, the share of steps that the decay takes.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the mean of squared gradients.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    clip: float = Field(default=1.0, ge=0, description="Largest norm of the whole gradient; 0: no clipping.")


class RunSettings(Settings):
    """How long, where, and with what resources."""

    folder: str = Field(default="runs/sft", min_length=1, description="Where everything about the run is written.")
    steps: int | None = Field(default=None, ge=0, description="Optimizer steps; none: as many as run.epochs take.")
    epochs: float = Field(default=1.0, gt=0, description="Passes over the data when run.steps is none.")
    seed: int = Field(default=0, ge=0, description="Decides data order, initial adapters and dropout.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto` is cuda where there is one.")
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="Of activations; `auto`: bf16 on cuda, fp32 on cpu."
    )
    step_tokens: int = Field(
        default=16384, ge=1, description="Tokens per optimizer step, over all micro-batches and ranks."
    )
    microbatch_tokens: int = Field(
        default=4096,
        ge=2,
        description="Tokens per forward pass on one device: what memory depends on. At most run.step_tokens.",
    )
    checkpointing: bool = Field(default=False, description="Recompute activations: less memory, more time.")
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="Compile the decoder block; `auto`: on cuda only."
    )


class SaveSettings(Settings):
    """Checkpoints and logs."""

    every: int = Field(default=100, ge=0, description="Steps between checkpoints; 0: at the end only.")
    keep: int = Field(default=2, ge=1, description="Newest checkpoints to keep; the best is kept besides.")
    resume: bool = Field(default=False, description="Continue the run from its newest checkpoint.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Of a fully trained model's files: fp32 is what was trained; bf16 halves and rounds it.",
    )
    log_every: int = Field(default=1, ge=1, description="Steps between lines of metrics.jsonl.")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=("tensorboard",), description="Where metrics go besides metrics.jsonl."
    )


class TrainingSettings(Settings):
    """What every training recipe has; a recipe's own Config adds to it."""

    model: ModelSettings = ModelSettings.model_construct()
    adapter: AdapterSettings = AdapterSettings.model_construct()
    data: DataSettings = DataSettings.model_construct()
    evaluate: EvaluateSettings = EvaluateSettings.model_construct()
    optim: OptimSettings = OptimSettings.model_construct()
    run: RunSettings = RunSettings.model_construct()
    save: SaveSettings = SaveSettings.model_construct()

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        """Turn `auto` storage and adapter and no learning rate into what they stand for: the written config says it."""
        if not isinstance(given, dict) or not all(isinstance(group, (Mapping, Settings)) for group in given.values()):
            return given  # a group given as a plain value: the field's own validation says so
        groups = {key: dict(given.get(key) or {}) for key in ("model", "adapter", "optim", "run", "data")}
        model, adapter, optim, run, data = groups.values()
        storage, kind = model.get("storage", "auto"), adapter.get("kind", "auto")
        if storage == "auto":
            model["storage"] = storage = "full" if kind == "none" else "bf16"
        if kind == "auto":
            adapter["kind"] = kind = "none" if storage == "full" else "lora"
        if optim.get("lr") is None:
            optim["lr"] = 2e-5 if storage == "full" else 2e-4
        with contextlib.suppress(TypeError, ValueError):  # values of a wrong kind are for the fields to complain about
            step = int(run.get("step_tokens", RunSettings.model_fields["step_tokens"].default))
            longest = int(data.get("max_length", 0))
            run.setdefault("microbatch_tokens", max(longest, min(4096, step)))
            data.setdefault("max_length", min(2048, int(run["microbatch_tokens"])))
        return {**given, **groups}

    @model_validator(mode="after")
    def _agree(self) -> "TrainingSettings":
        if (self.model.storage == "full") != (self.adapter.kind == "none"):
            raise ValueError(
                f"model.storage={self.model.storage} and adapter.kind={self.adapter.kind} leave "
                + ("two things" if self.model.storage == "full" else "nothing")
                + " to train: write model.storage=full adapter.kind=none for full weights, "
                "or model.storage=bf16|nf4 adapter.kind=lora|dora|ia3 for an adapter"
            )
        if self.run.step_tokens < self.run.microbatch_tokens:
            raise ValueError(
                f"run.step_tokens={self.run.step_tokens} is less than a micro-batch of run.microbatch_tokens="
                f"{self.run.microbatch_tokens}: write run.microbatch_tokens={self.run.step_tokens}"
            )
        if self.run.microbatch_tokens < self.data.max_length:
            raise ValueError(
                f"run.microbatch_tokens={self.run.microbatch_tokens} is less than "
                f"data.max_length={self.data.max_length}, so a longest row would fit no micro-batch: write "
                f"run.microbatch_tokens={self.data.max_length} or data.max_length={self.run.microbatch_tokens}"
            )
        return self


class Stopped(Exception):
    """The run was asked to stop and has saved itself; the message says how to go on."""


class ConfigError(ValueError):
    """A setting is wrong; the message is one line that names it and says what to write instead."""


S = TypeVar("S", bound=Settings)


def parse(schema: type[S], words: Sequence[str]) -> S:
    """The settings that a command line asks for: YAML files first, in order, then key=value words over them.

    Raises ConfigError, whose message is one line, for a file that cannot be read, a word that is neither, an unknown
    key (with the nearest known one), a value of the wrong kind, or settings that contradict each other.
    """
    tree: dict[str, Any] = {}
    pairs = [word for word in words if "=" in word and not word.startswith("-")]
    for word in words:
        if word.endswith((".yaml", ".yml")) and word not in pairs:
            _merge(tree, _read_yaml(Path(word)))
        elif word not in pairs:
            dashes = "leave off the dashes" if word.startswith("--") and "=" in word else "--help lists the keys"
            raise ConfigError(f"'{word}' is neither key=value nor a .yaml file; {dashes}")
    kinds = {key: kind for key, kind, *_ in fields(schema)}
    for word in pairs:
        key, _, text = word.partition("=")
        _put(tree, key.strip(), _value(kinds.get(key.strip(), ""), key.strip(), text))
    return build(schema, tree)


def build(schema: type[S], tree: Mapping[str, Any]) -> S:
    """Settings from a nested mapping, with the same one-line errors as `parse`."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(schema, error.errors()[0])) from None


def to_yaml(settings: Settings) -> str:
    """The settings as YAML that `parse` reads back to the same object."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def fields(schema: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every setting as (dotted key, kind, default, sentence), in the order of the classes."""
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else _show(field.get_default(call_default_factory=True))
            yield prefix + name, _kind_name(kind), default, field.description or ""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise ConfigError(f"{path} is empty; write `key: value` lines into it")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not a {type(tree).__name__}")
    return tree


def _value(kind: str, key: str, text: str) -> Any:
    """A word's value: as it stands where text is wanted, else YAML's reading: lists, numbers, true and null."""
    listed = text.startswith("[") and text.endswith("]")
    if kind.startswith("str") and not (listed and "tuple" in kind):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return None if text in ("none", "null") and "none" in kind else text[1:-1] if quoted else text
    if kind.startswith("tuple") and not listed:
        return [] if text in ("", "none") else text.split(",")
    try:
        return yaml.safe_load(text) if text.strip() else text
    except yaml.YAMLError:
        if listed:
            raise ConfigError(f"'{key}' looks like a list that YAML cannot read: put its items in quotes") from None
        return text


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
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
    path = [str(part) for part in problem["loc"]]
    known = [key for key, *_ in fields(schema)]
    key = next((k for k in (".".join(path[:n]) for n in range(len(path), 0, -1)) if k in known), ".".join(path))
    given = _show(problem["input"])
    match problem["type"]:
        case "extra_forbidden":
            if isinstance(problem["input"], dict) and problem["input"]:
                key = f"{key}.{next(iter(problem['input']))}"  # the group is unknown: name the whole setting
            nearest = nearest_name(key, known)
            return f"unknown key '{key}'" + (f"; did you mean '{nearest}'?" if nearest else "; --help lists the keys")
        case "missing":
            return f"'{key}' is required: write {key}=..."
        case "value_error":
            return str(problem.get("ctx", {}).get("error", problem["msg"]))
        case "literal_error":
            choices = problem.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ")
            return f"'{key}' is one of {choices}, not {given}"
        case _:
            if any(name.startswith(f"{key}.") for name in known):
                return f"'{key}' is a group of settings, not {given}: write {key}.NAME=..."
            kind = next((kind for name, kind, *_ in fields(schema) if name == key), "")
            return f"'{key}' should be {kind or 'different'}, not {given} ({problem['msg'].lower()})"


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
