"""REINFORCE++: one answer to each prompt, the reward still to come at each token as its advantage, whitened over all
tokens of the step, and the clipped loss of PPO; no value model.

Hu 2025 (arXiv 2501.03262).
"""

from dataclasses import replace
from typing import Any

from pydantic import Field

from burnish.sampling.task import open_task
from burnish.settings import ReinforcementSettings
from burnish.types import RolloutBatch


class Config(ReinforcementSettings):
    """The settings of REINFORCE++, besides those that reinforcement learning has in common."""

    clip: float = Field(default=0.2, gt=0, lt=1, description="ε: how far a ratio counts from 1.")
    epochs: int = Field(default=1, ge=1, description="Passes over the answers of a step.")
    minibatches: int = Field(default=1, ge=1, description="Optimizer steps per pass.")
    gamma: float = Field(default=1.0, gt=0, le=1, description="Discount per token.")


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
    from burnish.losses.advantage import returns_to_go, token_rewards
    from burnish.losses.policy import ppo_loss
    from burnish.report.results import finish, method_name
    from burnish.sampling.cast import open_cast
    from burnish.sampling.experience import num_tokens, passes, whitened
    from burnish.sampling.practice import Practice

    with open_mesh(config.run.device) as mesh:
        # 2. The policy learns; the reference and the reward stay as they are.
        cast = open_cast(task, mesh)
        policy, reference = cast.policy, cast.reference
        updates = config.epochs * config.minibatches
        learner = open_learner(policy.model, policy.adapter, config.optim, task.steps * updates, mesh, counted=False)
        practice = Practice(task, cast, mesh, config.minibatches, learner.room)

        # 3. Before any weight changes: what each token earned, and all that came after it.
        def observe(batch: RolloutBatch) -> RolloutBatch:
            old = policy.log_probs(batch).detach()  # by the very pass that the update makes, so that ratios start at 1
            with torch.no_grad():
                known = reference.log_probs(batch)
            beta = practice.controller.beta
            rewards = token_rewards(old, known, batch.scores, batch, beta, config.kl.estimator)
            advantages = returns_to_go(rewards, batch, config.gamma)
            return replace(batch, old_log_probs=old, reference_log_probs=known, advantages=advantages)

        # 4. The loss.
        def objective(batch: RolloutBatch):
            now = policy.log_probs(batch)
            return ppo_loss(now, batch.old_log_probs, batch.advantages, batch.weights, config.clip)

        judge = open_judge(task, cast, learner.room)
        with Run(config, [learner], cast.models, task.steps, practice.fingerprint, practice.states) as run:
            before = run.once("before", judge.verdict)
            for step in run.steps():
                minibatches = whitened(practice.experience(step, observe), mesh)
                with practice.phases("update"):
                    order = passes(minibatches, config.epochs, (config.run.seed, step))
                    done = [learner.step(minibatch, objective, count=num_tokens) for minibatch in order]
                run.log(practice.metrics(step, minibatches, done))
                run.write_json("answers.json", practice.samples())
                if config.evaluate.every and (step + 1) % config.evaluate.every == 0:
                    run.log_evaluation(judge.verdict()["metrics"])
            after = run.once("after", judge.verdict)

            # 5. What is left of it: an adapter or a model, the table, the page.
            save_trained(learner, policy.model, run.folder, task.start, config, task.tokenizer, task.template)
            return finish(
                run, run.folder, method_name(config.model.storage, config.adapter.kind, "REINFORCE++"), before, after
            )
