"""PPO: the policy answers, a reward scores the answers, and a clipped policy gradient follows what a value model did
not expect, held near the reference by the KL divergence.

Ziegler et al. 2019 (arXiv 1909.08593), Ouyang et al. 2022 (arXiv 2203.02155), Schulman et al. 2017 (arXiv 1707.06347).
Policy, reference, value and reward are adapters on one base.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from burnish.config import Settings
from burnish.sampling.task import Task, open_task
from burnish.settings import OptimSettings, ReinforcementSettings, RewardSettings
from burnish.types import RolloutBatch


class EndedRewardSettings(RewardSettings):
    """What an answer is worth; here it should end by itself."""

    missing_eos: Literal["none", "replace", "subtract", "mask"] = Field(
        default="subtract", description="What becomes of the score of an answer that does not end by itself."
    )


class ValueSettings(Settings):
    """The value model, which says what the rest of an answer is expected to earn."""

    lr: float | None = Field(default=None, ge=0, description="Peak learning rate; none: optim.lr.")
    clip: float = Field(default=0.2, gt=0, description="How far a value may move from its old one in a step's update.")
    warmup: int = Field(default=0, ge=0, description="Steps at the start in which the value model alone is trained.")


class Config(ReinforcementSettings):
    """The settings of PPO, besides those that reinforcement learning has in common."""

    reward: EndedRewardSettings = EndedRewardSettings.model_construct()  # pyright: ignore[reportIncompatibleVariableOverride]
    profile: Literal["instruct", "summarize"] = Field(
        default="instruct",
        description="Which defaults: those shown here, or those of the TL;DR reproduction (arXiv 2403.17031).",
    )
    clip: float = Field(default=0.2, gt=0, lt=1, description="ε: how far a ratio counts from 1.")
    epochs: int = Field(default=1, ge=1, description="Passes over the answers of a step.")
    minibatches: int = Field(default=4, ge=1, description="Optimizer steps per pass.")
    gamma: float = Field(default=1.0, gt=0, le=1, description="Discount per token.")
    lam: float = Field(default=0.95, ge=0, le=1, description="λ of generalised advantage estimation.")
    score_after_end: bool = Field(
        default=False, description="Count the score one slot after the end token, which the value model learns as well."
    )
    value: ValueSettings = ValueSettings.model_construct()

    @property
    def value_optim(self) -> OptimSettings:
        """The value model's optimizer: the policy's, but for the learning rate where it has one of its own."""
        given = self.value.lr
        return self.optim if given is None else self.optim.model_copy(update={"lr": given})

    @model_validator(mode="before")
    @classmethod
    def _fill_in_profile(cls, given: Any) -> Any:
        """The profile's values where nothing is given."""
        filled = dict(given) if isinstance(given, Mapping) else {}
        for key, value in PROFILES.get(filled.get("profile", ""), {}).items():
            if not isinstance(value, Mapping):
                filled.setdefault(key, value)
            elif isinstance(filled.get(key, {}), Mapping):
                filled[key] = {**value, **filled.get(key, {})}
        return filled or given


PROFILES: dict[str, dict[str, Any]] = {
    "summarize": {
        "rollout": {"prompts": 512, "max_tokens": 53, "temperature": 0.7},
        "reward": {"missing_eos": "replace"},
        "optim": {"lr": 3e-6, "schedule": "linear", "warmup": 0, "eps": 1e-5, "clip": 0},
        "epochs": 4,
        "minibatches": 1,
        "score_after_end": True,
    },
}
"""What a profile stands for, where it differs from the defaults."""


def main(config: Config) -> dict[str, Any]:
    """Trains and evaluates; gives the run's row of results, which is also in results.json of its folder."""
    # 1. Prompts, and whatever can be wrong before torch is loaded.
    task = open_task(config)
    config = checked(task)

    import torch

    from burnish.engine.assemble import open_learner, save_trained
    from burnish.engine.mesh import open_mesh
    from burnish.engine.run import Run
    from burnish.evaluate.judge import open_judge
    from burnish.losses.advantage import gae, steps_of, token_rewards
    from burnish.losses.policy import ppo_loss, value_loss
    from burnish.report.results import finish, method_name
    from burnish.sampling.cast import open_cast, save_value
    from burnish.sampling.experience import num_tokens, num_values, passes, whitened
    from burnish.sampling.practice import Practice

    with open_mesh(config.run.device) as mesh:
        # 2. Four roles on one base: policy and value model learn, reference and reward stay as they are.
        cast = open_cast(task, mesh, with_value=True)
        policy, reference, value = cast.policy, cast.reference, cast.value
        assert value is not None
        updates, warmup, optim = config.epochs * config.minibatches, config.value.warmup, config.value_optim
        steps, spared, own = task.steps * updates, warmup * updates, cast.value_parameters
        policy_learner = open_learner(policy.model, policy.adapter, config.optim, steps - spared, mesh, counted=False)
        value_learner = open_learner(value.model, value.adapter, optim, steps, mesh, own, False, policy_learner)
        practice = Practice(task, cast, mesh, config.minibatches, policy_learner.room)

        # 3. What each token earned, and how much of it the value model did not expect; before any weight changes.
        def observe(batch: RolloutBatch) -> RolloutBatch:
            old = policy.log_probs(batch).detach()  # by the very pass that the update makes, so that ratios start at 1
            with torch.no_grad():
                known, values = reference.log_probs(batch), value.values(batch)
            places = steps_of(batch, batch.ended if config.score_after_end else None)
            beta = practice.controller.beta
            rewards = token_rewards(old, known, batch.scores, batch, beta, config.kl.estimator, places)
            advantages, returns = gae(rewards, values, batch, config.gamma, config.lam, places)
            return replace(
                batch,
                old_log_probs=old,
                reference_log_probs=known,
                old_values=values,
                advantages=advantages,
                returns=returns,
                value_weights=places.float(),
            )

        # 4. The losses of the policy and of the value model.
        def policy_objective(batch: RolloutBatch):
            now = policy.log_probs(batch)
            return ppo_loss(now, batch.old_log_probs, batch.advantages, batch.weights, config.clip)

        def value_objective(batch: RolloutBatch):
            values = value.values(batch)
            return value_loss(values, batch.old_values, batch.returns, batch.value_weights, config.value.clip)

        judge = open_judge(task, cast, policy_learner.room)
        learners = [policy_learner, value_learner]
        with Run(config, learners, cast.models, task.steps, practice.fingerprint, practice.states) as run:
            before = run.once("before", judge.verdict)
            for step in run.steps():
                minibatches = whitened(practice.experience(step, observe), mesh)
                policy_updates, value_updates = [], []
                with practice.phases("update"):
                    for minibatch in passes(minibatches, config.epochs, (config.run.seed, step)):
                        if step >= warmup:
                            policy_updates.append(policy_learner.step(minibatch, policy_objective, count=num_tokens))
                        value_updates.append(value_learner.step(minibatch, value_objective, count=num_values))
                run.log(practice.metrics(step, minibatches, policy_updates, value=value_updates))
                run.write_json("answers.json", practice.samples())
                if config.evaluate.every and (step + 1) % config.evaluate.every == 0:
                    run.log_evaluation(judge.verdict()["metrics"])
            after = run.once("after", judge.verdict)

            # 5. What is left of it: the policy's adapter, the value model's beside it, the table, the page.
            save_trained(policy_learner, policy.model, run.folder, task.start, config, task.tokenizer, task.template)
            save_value(cast, run.folder / "value", task, value_learner)
            return finish(run, run.folder, method_name(config.model.storage, config.adapter.kind, "PPO"), before, after)


def checked(task: Task[Config]) -> Config:
    """The task's settings. Raises ValueError where the value model's warm-up leaves the policy no step."""
    warmup, steps = task.config.value.warmup, task.steps
    if 0 < steps <= warmup:
        raise ValueError(
            f"value.warmup={warmup} takes all {steps} steps, and the policy would learn nothing: write a smaller one, "
            "or more run.steps"
        )
    return task.config
