"""GRPO: several answers to each prompt, and a clipped policy gradient that follows how each compares with the others;
no value model. The KL divergence from the reference is a second loss, or part of what an answer is worth.

Shao et al. 2024 (arXiv 2402.03300); `scale=false average=constant` is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field

from burnish.sampling.task import open_task
from burnish.settings import GroupRolloutSettings, KLSettings, ReinforcementSettings
from burnish.types import RolloutBatch


class LossKLSettings(KLSettings):
    """The pull towards the reference, as a part of the loss."""

    beta: float = Field(default=0.04, gt=0, description="How much a nat of divergence costs.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="Of the divergence, token by token; in the loss times the ratio. For the reward write k1.",
    )
    place: Literal["loss", "reward"] = Field(
        default="loss",
        description="Where it counts. A loss sees each token's own divergence alone, not that of the tokens after it.",
    )


class Config(ReinforcementSettings):
    """The settings of GRPO, besides those that reinforcement learning has in common."""

    rollout: GroupRolloutSettings = GroupRolloutSettings.model_construct()  # pyright: ignore[reportIncompatibleVariableOverride]
    kl: LossKLSettings = LossKLSettings.model_construct()  # pyright: ignore[reportIncompatibleVariableOverride]
    clip: float = Field(default=0.2, gt=0, lt=1, description="ε: how far a ratio counts from 1.")
    epochs: int = Field(default=1, ge=1, description="Passes over the answers of a step.")
    minibatches: int = Field(default=1, ge=1, description="Optimizer steps per pass.")
    scale: bool = Field(default=True, description="Divide by the deviation of a group's scores.")
    average: Literal["sequence", "token", "constant"] = Field(
        default="sequence",
        description="What counts the same: every answer; every token; or every token, over rollout.max_tokens.",
    )


def main(config: Config) -> dict[str, Any]:
    """Trains and evaluates; gives the run's row of results, which is also in results.json of its folder."""
    # 1. Prompts, and whatever can be wrong before torch is loaded.
    task = open_task(config)
    config = task.config

    import torch

    from burnish.engine.assemble import open_learner, save_trained
    from burnish.engine.mesh import open_mesh
    from burnish.engine.run import Run
    from burnish.evaluate.judge import open_judge
    from burnish.losses.advantage import group_relative
    from burnish.losses.policy import averaging, kl_loss, ppo_loss
    from burnish.report.results import finish, method_name
    from burnish.sampling.cast import open_cast
    from burnish.sampling.experience import compared, passes, worth_of
    from burnish.sampling.practice import Practice

    with open_mesh(config.run.device) as mesh:
        # 2. The policy learns; the reference and the reward stay as they are.
        cast = open_cast(task, mesh)
        policy, reference = cast.policy, cast.reference
        updates = config.epochs * config.minibatches
        learner = open_learner(policy.model, policy.adapter, config.optim, task.steps * updates, mesh, counted=False)
        practice = Practice(task, cast, mesh, config.minibatches, learner.room)

        # 3. Before any weight changes: log-probs of the answers, and how each compares with the others of its group.
        def observe(batch: RolloutBatch) -> RolloutBatch:
            old = policy.log_probs(batch).detach()  # by the very pass that the update makes, so that ratios start at 1
            with torch.no_grad():
                return replace(batch, old_log_probs=old, reference_log_probs=reference.log_probs(batch))

        def worth(batch: RolloutBatch) -> torch.Tensor:
            beta = practice.controller.beta if config.kl.place == "reward" else 0.0
            return worth_of(batch, beta, config.kl.estimator)

        # 4. The loss: the clipped surrogate, and the divergence from the reference.
        def objective(batch: RolloutBatch):
            now, old = policy.log_probs(batch), batch.old_log_probs
            weights, _ = averaging(batch, config.average, config.rollout.max_tokens)
            surrogate, metrics = ppo_loss(now, old, batch.advantages, weights, config.clip)
            if config.average == "constant":  # what is logged beside the loss are means over tokens that there are
                means = averaging(batch, "sequence", 1)[0] * config.rollout.max_tokens
                _, metrics = ppo_loss(now, old, batch.advantages, means, config.clip)
            if config.kl.place == "reward":
                return surrogate, metrics
            divergence, _ = kl_loss(now, batch.reference_log_probs, weights, config.kl.estimator, old)
            return surrogate + practice.controller.beta * divergence, metrics

        def count(batch: RolloutBatch) -> float:
            return averaging(batch, config.average, config.rollout.max_tokens)[1]

        judge = open_judge(task, cast, learner.room)
        with Run(config, [learner], cast.models, task.steps, practice.fingerprint, practice.states) as run:
            before = run.once("before", judge.verdict)
            for step in run.steps():
                compare = partial(group_relative, scale=config.scale)
                minibatches = compared(practice.experience(step, observe), worth, compare)
                with practice.phases("update"):
                    order = passes(minibatches, config.epochs, (config.run.seed, step))
                    done = [learner.step(minibatch, objective, count) for minibatch in order]
                run.log(practice.metrics(step, minibatches, done))
                run.write_json("answers.json", practice.samples())
                if config.evaluate.every and (step + 1) % config.evaluate.every == 0:
                    run.log_evaluation(judge.verdict()["metrics"])
            after = run.once("after", judge.verdict)

            # 5. What is left of it: an adapter or a model, the table, the page.
            save_trained(learner, policy.model, run.folder, task.start, config, task.tokenizer, task.template)
            return finish(
                run, run.folder, method_name(config.model.storage, config.adapter.kind, "GRPO"), before, after
            )
