"""Supervised fine-tuning: minimise −Σ w_t log P(y_t | x, y_<t) over the tokens of the responses,
with full weights, or with an adapter on a frozen base: LoRA, and with model.storage=nf4 QLoRA."""

import math
from typing import Any

from burnish.data.prepare import prepare
from burnish.data.stream import Stream
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.preflight import check_positions, preflight
from burnish.engine.progress import progress_bar
from burnish.engine.start import begin
from burnish.settings import TrainingSettings
from burnish.types import Batch


class Config(TrainingSettings):
    """The settings of supervised fine-tuning: those that every training recipe has."""


def main(config: Config) -> dict[str, Any]:
    """Trains and evaluates; gives the run's row of results, which is also in results.json of its folder."""
    # 1. Data: rows -> token sequences with a weight per token. Whatever is wrong with settings, paths or rows is said
    #    before the seconds that loading torch takes.
    config, start = begin(config)
    preflight(config)
    budget = config.run.microbatch_tokens
    tokenizer = Tokenizer.load(start.words)
    template = ChatTemplate.open(config.model.template, tokenizer)
    with progress_bar("tokenising") as progress:
        data = prepare(
            config.data, config.evaluate, tokenizer, template, config.run.seed, budget=budget, progress=progress
        )
    check_positions(start.base, int(data.train.lengths.max()))

    from burnish.engine.assemble import open_learner, open_model, save_trained
    from burnish.engine.mesh import open_mesh
    from burnish.engine.run import Run
    from burnish.evaluate.judge import Judge
    from burnish.losses.likelihood import cross_entropy
    from burnish.report.results import finish, method_name

    with open_mesh(config.run.device) as mesh:
        if mesh.is_main:
            print("\n".join(data.audit.lines()))
            print("(tokenised before: found in the cache)" if data.cached else "")

        # 2. Micro-batches: packs of whole sequences, as many a step as run.step_tokens asks for.
        microbatches = math.ceil(config.run.step_tokens / (budget * mesh.world))
        stream = Stream(data.train, budget, microbatches, config.run.seed, mesh.rank, mesh.world)
        steps = config.run.steps if config.run.steps is not None else stream.steps_in(config.run.epochs)

        # 3. The model: one stored weight per layer, and beside it the adapter, if any; only one of the two trains.
        model, adapter = open_model(start, config.model, config.adapter, config.run, mesh, optim=config.optim)
        learner = open_learner(model, adapter, config.optim, steps, mesh)
        lengths = (config.data.max_length, budget)
        judge = Judge(model, adapter, tokenizer, template, data.held_out, data.prompts, config.evaluate, lengths)
        judge.beside(learner.room)

        # 4. The method.
        def objective(batch: Batch):
            scores = model.score(batch, adapter)
            return cross_entropy(scores.log_probs, batch.weights, scores.correct)

        with Run(config, [learner], model, steps, stream.fingerprint) as run:
            run.write_json("audit.json", data.audit.as_dict())
            before = run.once("before", judge.verdict)
            for step in run.steps():
                batches = [batch.to(mesh.device) for batch in stream.step(step)]
                run.log(learner.step(batches, objective, count=lambda batch: batch.total_weight))
                if config.evaluate.every and (step + 1) % config.evaluate.every == 0:
                    run.log_evaluation(judge.losses())
            after = run.once("after", judge.verdict)

            # 5. What is left of it: a model or an adapter folder, the table, the page.
            save_trained(learner, model, run.folder, start, config, tokenizer, template)
            return finish(run, run.folder, method_name(config.model.storage, config.adapter.kind), before, after)
