"""The groups of settings that recipes and tools share. Imports no torch."""

import contextlib
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from burnish.config import Settings

TRAINED_STORAGES = ("full", "full16")
"""The values of model.storage that train the weights themselves, without an adapter."""


class ModelSettings(Settings):
    """Which model, and how its weights are kept."""

    path: str = Field(default="embedded", description="A folder in Hugging Face layout, a hub id, or `embedded`.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    storage: Literal["auto", "full", "full16", "bf16", "fp32", "nf4"] = Field(
        default="auto",
        description="How the base weights are kept: `full` trains them in fp32, `full16` in bf16, rounding by chance; "
        "`bf16` and `fp32` freeze them, `nf4` freezes them in 4 bits. `auto` is `full` without an adapter, else "
        "`bf16`.",
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
        description="Which adapter to train. `auto` is `none` when model.storage is `full` or `full16`, else `lora`.",
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
        "question_answer, text, prompt, prompt_chosen_rejected, chosen_rejected, ranked_answers, judged.",
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

    kind: Literal["adamw", "adamw8bit"] = Field(
        default="adamw",
        description="`adamw` keeps 8 bytes of state a weight, `adamw8bit` 2, with nearly the same result.",
    )
    lr: float | None = Field(
        default=None,
        ge=0,
        description="Peak learning rate; none: what the method usually takes, for full weights or for adapters.",
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

    folder: str = Field(
        default="auto", min_length=1, description="Where everything about the run is written; `auto`: runs/RECIPE."
    )
    steps: int | None = Field(default=None, ge=0, description="Optimizer steps; none: as many as run.epochs take.")
    epochs: float = Field(default=1.0, gt=0, description="Passes over the data when run.steps is none.")
    seed: int = Field(default=0, ge=0, description="Decides data order, initial adapters and dropout.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto` is cuda where there is one.")
    dtype: Literal["auto", "bf16", "fp32", "fp8"] = Field(
        default="auto",
        description="Of activations; `auto`: bf16 on cuda, fp32 on cpu. `fp8` is `auto` with matrix products of frozen "
        "weights in 8-bit floats: faster on Hopper and later GPUs, a little less exact.",
    )
    step_tokens: int = Field(
        default=16384, ge=1, description="Tokens per optimizer step, over all micro-batches and ranks."
    )
    microbatch_tokens: int = Field(
        default=4096,
        ge=2,
        description="Tokens per forward pass on one device: what memory depends on. At most run.step_tokens.",
    )
    memory: str = Field(
        default="auto",
        description="What the run may take of the device, as in `24GB`: what does not fit is computed twice. `auto`: "
        "what is free; `least`: as little as can be. Of blocks that only a compiler runs, an amount means `least`.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Compile decoder blocks, and with run.memory=auto replay CUDA graphs; `auto`: on cuda; `off`: no.",
    )

    @property
    def fp8(self) -> bool:
        """Whether frozen weights are multiplied with in 8-bit floats."""
        return self.dtype == "fp8"

    @model_validator(mode="after")
    def _memory_is_an_amount(self) -> "RunSettings":
        memory_bytes(self.memory)
        return self


def memory_bytes(text: str) -> int | None:
    """The bytes that `run.memory` allows; None where it names no amount: `auto` and `least`.

    Raises ValueError for anything else.
    """
    if text in ("auto", "least"):
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(G|Gi|M|Mi)B", text)
    if found is None or not float(found[1]):
        raise ValueError(f"run.memory={text} is no amount: write auto, least, or an amount such as 24GB or 22.5GiB")
    return int(float(found[1]) * {"G": 10**9, "Gi": 2**30, "M": 10**6, "Mi": 2**20}[found[2]])


class SaveSettings(Settings):
    """Checkpoints and logs."""

    every: int = Field(default=100, ge=0, description="Steps between checkpoints; 0: at the end only.")
    keep: int = Field(default=2, ge=1, description="Newest checkpoints to keep; the best is kept besides.")
    resume: bool = Field(default=False, description="Continue the run from its newest checkpoint.")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Of a fully trained model's files: fp32 is what was trained; bf16 halves and rounds it. What "
        "`full16` trained is bf16 either way.",
    )
    log_every: int = Field(default=1, ge=1, description="Steps between lines of metrics.jsonl.")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=("tensorboard",), description="Where metrics go besides metrics.jsonl."
    )


class RolloutSettings(Settings):
    """How the policy answers prompts in training."""

    prompts: int = Field(default=64, ge=1, description="Prompts per step, over all ranks.")
    samples: int = Field(default=1, ge=1, description="Answers to each prompt.")
    max_tokens: int = Field(default=256, ge=1, description="The longest answer, in tokens.")
    temperature: float = Field(default=1.0, gt=0, description="Divides the logits, in sampling and in every log-prob.")
    top_k: int = Field(default=0, ge=0, description="0, in training: see docs/ppo.md.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="1, in training: see docs/ppo.md.")
    stop: tuple[str, ...] = Field(default=(), description="Texts that end an answer, besides the end tokens.")
    slots: int = Field(default=64, ge=1, description="Answers written at once; memory depends on it, results do not.")


class GroupRolloutSettings(RolloutSettings):
    """How the policy answers prompts in training, several times each."""

    prompts: int = Field(default=16, ge=1, description="Prompts per step, over all ranks.")
    samples: int = Field(default=8, ge=2, description="Answers to each prompt, which are compared with each other.")


class RewardSettings(Settings):
    """What an answer is worth: exactly one of path, function and url."""

    path: str | None = Field(default=None, description="A run of `burnish reward`, or a reward model's folder.")
    function: str | None = Field(default=None, description="FILE.py:NAME, a function from samples to scores.")
    url: str | None = Field(default=None, description="An HTTP endpoint that is sent samples and answers with scores.")
    timeout: float = Field(default=60.0, gt=0, description="Seconds that one request may take.")
    retries: int = Field(default=3, ge=0, description="How often a failed request is sent again.")
    clip: float | None = Field(default=None, gt=0, description="Scores are cut to ±this.")
    storage: Literal["bf16", "fp32", "nf4"] = Field(
        default="bf16", description="How a reward model with a base of its own is kept."
    )
    missing_eos: Literal["none", "replace", "subtract", "mask"] = Field(
        default="none", description="What becomes of the score of an answer that does not end by itself."
    )
    missing_eos_value: float = Field(default=1.0, ge=0, description="replace: the score is minus this; subtract: less.")

    @model_validator(mode="after")
    def _one_source(self) -> "RewardSettings":
        given = [name for name in ("path", "function", "url") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(f'reward.{name}' for name in given)} are both given: write one of them")
        return self


class KLSettings(Settings):
    """The pull towards the reference."""

    beta: float = Field(default=0.05, gt=0, description="How much a nat of divergence costs.")
    estimator: Literal["k1", "k2", "k3"] = Field(default="k1", description="Of the divergence, token by token.")
    target: float | None = Field(default=None, gt=0, description="Adapt beta to hold the divergence of an answer here.")
    horizon: int = Field(default=10000, ge=1, description="How slowly beta adapts, in answers.")
    storage: Literal["bf16", "fp32", "nf4"] = Field(
        default="bf16", description="With full weights, how the frozen copy is kept that reference and value share."
    )


class TrainingSettings(Settings):
    """What every training recipe has; a recipe's own Config adds to it."""

    LEARNING_RATES: ClassVar[tuple[float, float]] = (2e-5, 2e-4)
    """What no optim.lr stands for: with full weights, with an adapter."""

    from_: str | None = Field(
        default=None,
        alias="from",
        min_length=1,
        description="A run, adapter or model folder to start from: where another recipe ended.",
    )
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
        """Turn `auto` and no learning rate into what they stand for: the written config says it.

        With `from`, what is stored there decides over storage and adapter: `engine.start` fills them in.
        """
        group_names = ("model", "adapter", "optim", "run", "data")
        if not isinstance(given, dict) or not all(
            isinstance(given.get(name, {}), (Mapping, Settings)) for name in group_names
        ):
            return given  # a group given as a plain value: the field's own validation says so
        groups = {key: dict(given.get(key) or {}) for key in group_names}
        model, adapter, optim, run, data = groups.values()
        storage, kind = model.get("storage", "auto"), adapter.get("kind", "auto")
        if given.get("from") is None:
            if storage == "auto":
                model["storage"] = storage = "full" if kind == "none" else "bf16"
            if kind == "auto":
                adapter["kind"] = kind = "none" if storage in TRAINED_STORAGES else "lora"
        if optim.get("lr") is None and "auto" not in (storage, kind):
            optim["lr"] = cls.LEARNING_RATES[0 if storage in TRAINED_STORAGES else 1]
        if run.get("folder", "auto") == "auto":
            run["folder"] = f"runs/{cls.__module__.rsplit('.', 1)[-1]}"
        with contextlib.suppress(TypeError, ValueError):  # values of a wrong kind are for the fields to complain about
            step = int(run.get("step_tokens", RunSettings.model_fields["step_tokens"].default))
            longest = int(data.get("max_length", 0))
            run.setdefault("microbatch_tokens", max(longest, min(4096, step)))
            data.setdefault("max_length", min(2048, int(run["microbatch_tokens"])))
        return {**given, **groups}

    @model_validator(mode="after")
    def _agree(self) -> "TrainingSettings":
        settled = "auto" not in (self.model.storage, self.adapter.kind)
        trained = self.model.storage in TRAINED_STORAGES
        if settled and trained != (self.adapter.kind == "none"):
            raise ValueError(
                f"model.storage={self.model.storage} and adapter.kind={self.adapter.kind} leave "
                + ("two things" if trained else "nothing")
                + " to train: write model.storage=full adapter.kind=none for full weights, "
                "or model.storage=bf16|nf4 adapter.kind=lora|dora|ia3 for an adapter"
            )
        if self.run.fp8 and self.model.storage.startswith("full"):
            raise ValueError(
                f"run.dtype=fp8 multiplies with frozen weights, and model.storage={self.model.storage} trains them: "
                "leave it out, or train an adapter"
            )
        if self.run.fp8 and (self.adapter.kind not in ("auto", "lora") or self.adapter.dropout):
            raise ValueError(
                f"run.dtype=fp8 goes with LoRA without dropout, not with adapter.kind={self.adapter.kind} "
                f"adapter.dropout={self.adapter.dropout}: leave it out, or write adapter.kind=lora adapter.dropout=0"
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


class ReinforcementSettings(TrainingSettings):
    """What the recipes share that learn from answers which the policy itself writes."""

    LEARNING_RATES: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    rollout: RolloutSettings = RolloutSettings.model_construct()
    reward: RewardSettings = RewardSettings.model_construct()
    kl: KLSettings = KLSettings.model_construct()

    @model_validator(mode="after")
    def _rollouts_can_be_scored(self) -> "ReinforcementSettings":
        if self.reward.path is None and self.reward.function is None and self.reward.url is None:
            raise ValueError("write reward.path=RUN, reward.function=FILE.py:NAME or reward.url=...: what answers earn")
        for name, neutral in (("top_k", 0), ("top_p", 1.0)):
            if (given := getattr(self.rollout, name)) != neutral:
                raise ValueError(
                    f"rollout.{name}={given}: answers would be drawn from another distribution than the one whose "
                    f"log-probs are trained, which biases every ratio and the KL; leave it out, and use "
                    "rollout.temperature to sharpen"
                )
        if self.adapter.dropout and self.adapter.kind != "auto":
            raise ValueError(
                f"adapter.dropout={self.adapter.dropout}: with dropout the policy that is updated is not the one that "
                "answered; leave it out"
            )
        answers = self.rollout.prompts * self.rollout.samples
        if self.kl.target is not None and answers >= 5 * self.kl.horizon:  # a step takes up to 0.2 answers / horizon
            raise ValueError(
                f"kl.horizon={self.kl.horizon} is too short for {answers} answers a step: one step could take all of "
                f"kl.beta, or more; write kl.horizon={answers} or more"
            )
        minibatches: int = getattr(self, "minibatches", 1)
        if "minibatches" in self.model_fields_set and minibatches > self.rollout.prompts:
            raise ValueError(
                f"minibatches={minibatches} is more than the rollout.prompts={self.rollout.prompts} of a step: write "
                f"minibatches={self.rollout.prompts} at most"
            )
        if self.data.max_length <= self.rollout.max_tokens:
            raise ValueError(
                f"data.max_length={self.data.max_length} leaves no room for a prompt before an answer of "
                f"rollout.max_tokens={self.rollout.max_tokens}: write a larger data.max_length"
            )
        return self
