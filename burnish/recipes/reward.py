"""Reward modelling: minimise −log σ(r(x, y_c) − r(x, y_r) − margin) over pairs of answers of which one is preferred,
where r is read by a scalar head at the last token. What it learns scores answers in `burnish ppo` and its relatives.

Ouyang et al. 2022 (arXiv 2203.02155), equation 1; Ziegler et al. 2019 (arXiv 1909.08593).
"""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from burnish.data.comparing import ComparisonStream
from burnish.data.preferences import prepare_preferences
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.preflight import check_positions, preflight
from burnish.engine.progress import progress_bar
from burnish.engine.start import begin
from burnish.settings import TrainingSettings
from burnish.types import PreferenceBatch


class Config(TrainingSettings):
    """The settings of reward modelling, besides those that every training recipe has."""

    LEARNING_RATES: ClassVar[tuple[float, float]] = (1e-5, 1e-4)
    """About InstructGPT's for full weights, and ten times as much for adapters."""

    centering: float = Field(
        default=0.0, ge=0, description="Adds this times (r_c + r_r)², which holds raw scores near 0."
    )
    normalise: Literal["all", "chosen", "none"] = Field(
        default="all",
        description="The answers of the training data whose scores shall have mean 0 and deviation 1: stored beside.",
    )
    share_prefix: bool = Field(default=True, description="Compute a prompt once for all its answers; same results.")


def main(config: Config) -> dict[str, Any]:
    """Trains and evaluates; gives the run's row of results, which is also in results.json of its folder."""
    # 1. Data: rows -> comparisons, each a prompt with its answers as token sequences. Whatever is wrong with settings,
    #    paths or rows is said before the seconds that loading torch takes.
    config, start = begin(config)
    preflight(config)
    budget, seed, share = config.run.microbatch_tokens, config.run.seed, config.share_prefix
    tokenizer = Tokenizer.load(start.words)
    template = ChatTemplate.open(config.model.template, tokenizer)
    with progress_bar("tokenising") as progress:
        data = prepare_preferences(
            config.data, config.evaluate, tokenizer, template, seed, budget=budget, progress=progress, kind="pairs"
        )
    check_positions(start.base, data.train.longest)

    from tqdm import tqdm

    from burnish.engine.assemble import open_learner
    from burnish.engine.mesh import open_mesh
    from burnish.engine.reward_training import open_reward_model, reward_parameters, save_reward
    from burnish.engine.rewards import REWARD, Normaliser
    from burnish.engine.roles import Role
    from burnish.engine.run import Run
    from burnish.evaluate.preference import doubts, measure_normaliser, ranking_metrics, score_comparisons
    from burnish.losses.reward import ranking_loss
    from burnish.ops.sequences import sequence_last
    from burnish.report.results import finish, method_name

    with open_mesh(config.run.device) as mesh:
        if mesh.is_main:
            print("\n".join(data.audit.lines()))
            print("(tokenised before: found in the cache)" if data.cached else "")

        # 2. Micro-batches of whole comparisons, as many a step as run.step_tokens asks for: all pairs of an answer are
        #    seen in the same step, and weigh 1 together (else K answers are K - 1 epochs).
        microbatches = math.ceil(config.run.step_tokens / (budget * mesh.world))
        stream = ComparisonStream(data.train, budget, microbatches, seed, mesh.rank, mesh.world, share)
        steps = config.run.steps if config.run.steps is not None else stream.steps_in(config.run.epochs)

        # 3. The model: the trunk that `from` left, and on it a fresh head.
        model, adapter = open_reward_model(start, config, mesh)
        learner = open_learner(model, adapter, config.optim, steps, mesh, reward_parameters(model, adapter))
        reward, room = Role(model, adapter, REWARD), learner.room.beside("evaluation")

        # 4. The method.
        def objective(batch: PreferenceBatch):
            scores = sequence_last(reward.values(batch), batch)
            return ranking_loss(scores, batch, config.centering)

        # 5. What it is worth: how it orders comparisons that it has not seen.
        def metrics() -> dict[str, float]:
            if not len(data.held_out):
                return {}
            scores = score_comparisons(reward, data.held_out, budget, share, room)
            found = ranking_metrics(scores, data.held_out)
            return {f"eval_{name}": value for name, value in found.items()}

        def verdict() -> dict[str, Any]:
            return {"metrics": metrics(), "samples": []}

        with Run(config, [learner], model, steps, stream.fingerprint) as run:
            run.write_json("audit.json", data.audit.as_dict())
            before = run.once("before", verdict)
            for step in run.steps():
                batches = [batch.to(mesh.device) for batch in stream.step(step)]
                run.log(learner.step(batches, objective, count=lambda batch: batch.num_pairs))
                if config.evaluate.every and (step + 1) % config.evaluate.every == 0:
                    run.log_evaluation(metrics())
            after = run.once("after", verdict)
            if mesh.is_main and after["metrics"]:
                for line in doubts(after["metrics"], len(data.held_out)):
                    tqdm.write(f"warning: {line}")

            # 6. What is left of it: a model or an adapter folder with what its scores mean, the table, the page.
            scale = Normaliser()
            if config.normalise != "none":
                scale = measure_normaliser(reward, data.train, budget, config.normalise, share, room)
            save_reward(learner, model, start, config, tokenizer, template, scale)
            method = method_name(config.model.storage, config.adapter.kind, "reward model")
            return finish(run, run.folder, method, before, after)
