"""RLOO: several answers to each prompt, and REINFORCE on whole answers with the mean of the others as the baseline.

Ahmadian et al. 2024 (arXiv 2402.14740). No value model, no clipping; the KL divergence is part of the reward.
"""

from dataclasses import replace
from typing import Any

from burnish.sampling.task import open_task
from burnish.settings import GroupRolloutSettings, ReinforcementSettings
from burnish.types import RolloutBatch


class Config(ReinforcementSettings):
    """The settings of RLOO: those that reinforcement learning has in common. Each step is one update."""

    rollout: GroupRolloutSettings = GroupRolloutSettings.model_construct()  # pyright: ignore[reportIncompatibleVariableOverride]


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
    from burnish.losses.advantage import leave_one_out
    from burnish.losses.policy import averaging, reinforce_loss
    from burnish.report.results import finish, method_name
    from burnish.sampling.cast import open_cast
    from burnish.sampling.experience import compared, num_answers, worth_of
    from burnish.sampling.practice import Practice

    with open_mesh(config.run.device) as mesh:
        # 2. The policy learns; the reference and the reward stay as they are.
        cast = open_cast(task, mesh)
        policy, reference = cast.policy, cast.reference
        learner = open_learner(policy.model, policy.adapter, config.optim, task.steps, mesh, counted=False)
        practice = Practice(task, cast, mesh, room=learner.room)

        # 3. Before any weight changes: log-probs of the answers, and what each is worth: R = score − β Σ_t k_t.
        def observe(batch: RolloutBatch) -> RolloutBatch:
            old = policy.log_probs(batch).detach()  # by the very pass that the update makes, so that ratios start at 1
            with torch.no_grad():
                return replace(batch, old_log_probs=old, reference_log_probs=reference.log_probs(batch))

        def worth(batch: RolloutBatch) -> torch.Tensor:
            return worth_of(batch, practice.controller.beta, config.kl.estimator)

        # 4. The loss: −A_i Σ_t log π(y_t), where A_i is R_i less the mean R of the group's other answers.
        def objective(batch: RolloutBatch):
            now, old = policy.log_probs(batch), batch.old_log_probs
            loss, _ = reinforce_loss(now, old, batch.advantages, batch.weights)
            # An answer's loss is a sum over its tokens; what is logged of it beside that are means.
            _, metrics = reinforce_loss(now, old, batch.advantages, averaging(batch, "sequence", 1)[0])
            return loss, metrics

        judge = open_judge(task, cast, learner.room)
        with Run(config, [learner], cast.models, task.steps, practice.fingerprint, practice.states) as run:
            before = run.once("before", judge.verdict)
            for step in run.steps():
                minibatches = compared(practice.experience(step, observe), worth, leave_one_out)
                with practice.phases("update"):
                    done = [learner.step(minibatch, objective, count=num_answers) for minibatch in minibatches]
                run.log(practice.metrics(step, minibatches, done))
                run.write_json("answers.json", practice.samples())
                if config.evaluate.every and (step + 1) % config.evaluate.every == 0:
                    run.log_evaluation(judge.verdict()["metrics"])
            after = run.once("after", judge.verdict)

            # 5. What is left of it: an adapter or a model, the table, the page.
            save_trained(learner, policy.model, run.folder, task.start, config, task.tokenizer, task.template)
            return finish(
                run, run.folder, method_name(config.model.storage, config.adapter.kind, "RLOO"), before, after
            )
