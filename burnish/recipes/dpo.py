"""Direct preference optimisation and its relatives: raise the chosen answer over the rejected one, relative to a frozen
reference, −log σ(β log π(y_c|x)/π_ref(y_c|x) − β log π(y_r|x)/π_ref(y_r|x)); no reward model, no sampling.

Rafailov et al. 2023 (arXiv 2305.18290). `losses/preference.py` has every loss with its formula.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from burnish.config import nearest_name, read_value
from burnish.data.comparing import ComparisonStream
from burnish.data.comparisons import Comparisons
from burnish.data.preferences import PreparedPreferences, prepare_preferences
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.preflight import check_positions, preflight
from burnish.engine.progress import progress_bar
from burnish.engine.start import Start, begin
from burnish.settings import TrainingSettings
from burnish.types import PreferenceBatch

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.engine.learner import Objective
    from burnish.engine.mesh import Mesh
    from burnish.engine.reference import Refer
    from burnish.engine.roles import Role
    from burnish.engine.room import Room
    from burnish.losses.preference import Options
    from burnish.model.decoder import Decoder

KTO = "kto"
LOSSES = (
    *("sigmoid", "robust", "ipo", "hinge", "slic", "exo", "apo_zero", "apo_down", "sppo", "sigmoid_norm"),
    *("simpo", "orpo", "cpo", "sft", KTO),
)
"""What `loss` may name, here without loading torch."""
READ_BY = {
    "label_smoothing": ("sigmoid", "robust", "exo", "sigmoid_norm", "simpo", "cpo"),
    "margin": ("slic", "simpo"),
    "wanted_weight": (KTO,),
    "unwanted_weight": (KTO,),
}
"""The settings that some losses alone read: with others they would do nothing."""


class Config(TrainingSettings):
    """The settings of preference learning without a reward model, besides those that every training recipe has."""

    LEARNING_RATES: ClassVar[tuple[float, float]] = (5e-7, 5e-6)
    """Those of Zephyr (Tunstall et al. 2023) and its QLoRA twin: the pairs push a model that already writes well."""

    loss: str | dict[str, float] = Field(
        default="sigmoid",
        description=f"One of {', '.join(LOSSES)}; or several with weights, {{sigmoid: 1, sft: 0.1}}.",
    )
    beta: float = Field(default=0.1, gt=0, description="How strongly the policy is held to the reference.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="The share of labels taken to be wrong; exo needs some, robust below 0.5."
    )
    margin: float = Field(default=1.0, ge=0, description="By how much simpo and slic want the chosen answer ahead.")
    wanted_weight: float = Field(default=1.0, ge=0, description="With kto, what a wanted answer weighs.")
    unwanted_weight: float = Field(default=1.0, ge=0, description="With kto, what an unwanted answer weighs.")
    reference: Literal["auto", "cached", "on_the_fly"] = Field(
        default="auto",
        description="`cached`: its log-probs are computed once and kept on disk. `auto`: with full weights only.",
    )
    share_prefix: bool = Field(default=True, description="Compute a prompt once for all its answers; same results.")

    @property
    def mix(self) -> dict[str, float]:
        """The losses and their weights."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss

    @field_validator("loss", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """A word of the command line may hold a mapping; every name is one of LOSSES."""
        if isinstance(given, str) and given.startswith("{"):
            try:
                given = read_value("loss", given)
            except yaml.YAMLError:
                raise ValueError(f"loss={given} cannot be read: write loss='{{sigmoid: 1, sft: 0.1}}'") from None
        for name in given if isinstance(given, Mapping) else [given]:
            if name not in LOSSES:
                nearest = nearest_name(str(name), LOSSES)
                hint = f"did you mean '{nearest}'?" if nearest else f"known are {', '.join(LOSSES)}"
                raise ValueError(f"loss={name} is not known; {hint}")
        return given

    @model_validator(mode="after")
    def _fit(self) -> "Config":
        if not any(self.mix.values()) or min(self.mix.values()) < 0:
            raise ValueError(f"loss={self.loss}: weights are not negative, and one is above 0; write {{sigmoid: 1}}")
        if KTO in self.mix and len(self.mix) > 1:
            raise ValueError("loss: kto learns from answers with labels, the others from pairs; write loss=kto alone")
        if "exo" in self.mix and self.label_smoothing == 0:
            raise ValueError("loss=exo needs label_smoothing above 0: write label_smoothing=0.001, as the paper has it")
        if "robust" in self.mix and self.label_smoothing >= 0.5:
            raise ValueError(f"loss=robust needs label_smoothing below 0.5, not {self.label_smoothing}")
        for name, losses in READ_BY.items():
            if getattr(self, name) != type(self).model_fields[name].default and not self.mix.keys() & set(losses):
                raise ValueError(
                    f"{name} does nothing with loss={self.loss}: {', '.join(losses)} read it; leave it out"
                )
        if self.reference == "on_the_fly" and self.adapter.kind == "none":
            raise ValueError(
                "reference=on_the_fly needs an adapter: full weights change with the first step; write reference=cached"
            )
        return self


def main(config: Config) -> dict[str, Any]:
    """Trains and evaluates; gives the run's row of results, which is also in results.json of its folder."""
    # 1. Data: rows -> comparisons, each a prompt with its answers as token sequences. Whatever is wrong with settings,
    #    paths or rows is said before the seconds that loading torch takes.
    config, start = begin(config)
    preflight(config)
    budget, seed, kind = config.run.microbatch_tokens, config.run.seed, "labels" if KTO in config.mix else "pairs"
    tokenizer = Tokenizer.load(start.words)
    template = ChatTemplate.open(config.model.template, tokenizer)
    with progress_bar("tokenising") as progress:
        data = prepare_preferences(
            config.data, config.evaluate, tokenizer, template, seed, budget=budget, progress=progress, kind=kind
        )
    check_positions(start.base, data.train.longest)

    from burnish.engine.assemble import open_learner, open_model, reference_role, save_trained
    from burnish.engine.mesh import open_mesh
    from burnish.engine.roles import Role
    from burnish.engine.run import Run
    from burnish.evaluate.judge import Judge
    from burnish.evaluate.objective import evaluate_objective
    from burnish.losses.preference import pairs_of, preference_loss
    from burnish.report.results import finish, method_name

    with open_mesh(config.run.device) as mesh:
        if mesh.is_main:
            print("\n".join(data.audit.lines()))
            print("(tokenised before: found in the cache)" if data.cached else "")

        # 2. Micro-batches of whole comparisons, as many a step as run.step_tokens asks for.
        microbatches = math.ceil(config.run.step_tokens / (budget * mesh.world))
        stream = ComparisonStream(data.train, budget, microbatches, seed, mesh.rank, mesh.world, config.share_prefix)
        steps = config.run.steps if config.run.steps is not None else stream.steps_in(config.run.epochs)

        # 3. The policy trains. The reference is what it starts from, and stays: see `open_reference`.
        model, adapter = open_model(start, config.model, config.adapter, config.run, mesh, optim=config.optim)
        learner = open_learner(model, adapter, config.optim, steps, mesh)
        policy, refer = Role(model, adapter), open_reference(config, start, model, data, stream, mesh, learner.room)

        # 4. The method.
        options = options_of(config)

        def objective(batch: PreferenceBatch):
            pairs = pairs_of(policy.log_probs(batch), batch.reference_log_probs, batch)
            return preference_loss(pairs, batch.pair_weights, config.mix, options)

        def method(batches: Sequence[PreferenceBatch], room: "Room"):
            return kto_objective(policy, batches, options, mesh, room) if KTO in config.mix else objective

        def count(batch: PreferenceBatch) -> float:
            return batch.num_labels if KTO in config.mix else batch.num_pairs

        # 5. What it is worth: the objective on held-out comparisons, and answers beside the reference's.
        lengths, held_out = (config.data.max_length, budget), [refer(b) for b in one_pass(data.held_out, config)]
        judge = Judge(model, adapter, tokenizer, template, [], data.prompts, config.evaluate, lengths)
        judge.beside(learner.room).against(reference_role(model) if adapter else None)

        def preferences() -> dict[str, float]:
            aside = judge.room
            found = evaluate_objective(model, held_out, method(held_out, aside), count, aside) if held_out else {}
            return {f"eval_{name}": value for name, value in by_kind(found).items()}

        def verdict(before: Mapping[str, Any] | None = None) -> dict[str, Any]:
            found = judge.verdict(before)
            return found | {"metrics": preferences() | found["metrics"]}

        with Run(config, [learner], model, steps, stream.fingerprint) as run:
            run.write_json("audit.json", data.audit.as_dict())
            before = run.once("before", verdict)
            for step in run.steps():
                batches = [refer(batch) for batch in stream.step(step)]
                run.log(by_kind(learner.step(batches, method(batches, learner.room), count)))
                if config.evaluate.every and (step + 1) % config.evaluate.every == 0:
                    run.log_evaluation(preferences() | judge.losses())
            after = run.once("after", lambda: verdict(before))

            # 6. What is left of it: a model or an adapter folder, the table, the page.
            save_trained(learner, model, run.folder, start, config, tokenizer, template)
            name = method_name(config.model.storage, config.adapter.kind, "KTO" if KTO in config.mix else "DPO")
            return finish(run, run.folder, name, before, after)


def open_reference(
    config: Config,
    start: Start,
    model: "Decoder",
    data: PreparedPreferences,
    stream: ComparisonStream,
    mesh: "Mesh",
    room: "Room",
) -> "Refer":
    """What adds the reference's log-probs to a batch: of the adapter that training goes on from, or of the base beneath
    a fresh one. With full weights the model itself is the reference as long as no step is taken: it is asked about all
    data before, and what it said is kept on disk. Some losses ask none."""
    from burnish.engine.assemble import activation_dtype, reference_role
    from burnish.engine.reference import about_model, ask_about_all, asked, looked_up, no_reference, remembered
    from burnish.losses.preference import WITHOUT_REFERENCE

    if config.mix.keys() <= WITHOUT_REFERENCE:
        return no_reference(mesh)
    role = reference_role(model)
    if config.reference == "on_the_fly" or (config.reference == "auto" and config.adapter.kind != "none"):
        return asked(role, mesh, room)
    streams = [stream]
    if len(data.held_out):
        budget, share = config.run.microbatch_tokens, config.share_prefix
        streams.append(ComparisonStream(data.held_out, budget, 1, 0, mesh.rank, mesh.world, share))
    dtype = activation_dtype(config.run.dtype, mesh.device)
    about = about_model(start, config.model, config.run, dtype, mesh.device)
    with progress_bar("asking the reference") as progress:
        known = remembered(
            (data.train, data.held_out), about, lambda: ask_about_all(role, streams, mesh, progress, room), mesh
        )
    return looked_up(known, mesh)


def one_pass(comparisons: Comparisons, config: Config) -> list[PreferenceBatch]:
    """All comparisons once, as batches; the same on every rank."""
    if not len(comparisons):
        return []
    stream = ComparisonStream(comparisons, config.run.microbatch_tokens, 1, 0, share_prefix=config.share_prefix)
    return [batch for step in range(stream.num_packs) for batch in stream.step(step)]


def options_of(config: Config) -> "Options":
    """The constants of the losses."""
    from burnish.losses.preference import Options

    return Options(config.beta, config.label_smoothing, config.margin, config.wanted_weight, config.unwanted_weight)


def kto_objective(
    policy: "Role", batches: Sequence[PreferenceBatch], options: "Options", mesh: "Mesh", room: "Room"
) -> "Objective[PreferenceBatch]":
    """KTO's loss for these batches (Ethayarajh et al. 2024): each answer against the divergence from the reference.

    That is estimated, before any weight changes, on the answers to other prompts among the batches of all ranks.
    """
    import torch

    from burnish.losses.preference import answer_sums, kto_divergence, kto_loss

    def log_ratios(batch: PreferenceBatch) -> "Tensor":
        assert batch.reference_log_probs is not None
        return answer_sums(policy.log_probs(batch) - batch.reference_log_probs, batch)

    with torch.no_grad():
        found = room.each(batches, lambda batch: kto_divergence(log_ratios(batch), batch.labels))
        parts = [part for _, part in found]
        total, number = mesh.sum(torch.stack(parts).sum(0))
    divergence = total / number.clamp(min=1)
    return lambda batch: kto_loss(log_ratios(batch), batch.labels, divergence, options)


def by_kind(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics with KTO's rewards as means over the wanted and over the unwanted answers."""
    if "wanted" not in metrics:
        return dict(metrics)
    wanted = metrics["wanted"]
    shares = {"wanted_reward": wanted, "unwanted_reward": 1 - wanted}
    return {name: value / shares[name] if shares.get(name) else value for name, value in metrics.items()}
