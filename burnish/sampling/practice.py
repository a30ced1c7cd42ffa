"""A step of reinforcement learning up to its update: answer, score, arrange, observe; and what it says of the run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from burnish.engine.mesh import Mesh
from burnish.engine.relief import Relief
from burnish.engine.room import Room
from burnish.losses.kl import KLController
from burnish.model.decoder import Decoder
from burnish.sampling.cast import Cast
from burnish.sampling.experience import Actor, Minibatches, Phases, arrange, averaged
from burnish.sampling.health import Health, line, vital_signs
from burnish.sampling.reward_model import AdapterScorer, ModelScorer
from burnish.sampling.task import C, Task
from burnish.types import Rollout, RolloutBatch

NUM_SAMPLES = 8
"""Answers of the latest step that are kept for people to read."""


class Practice:
    """Has the policy answer the prompts of each step and the reward score the answers.

    `controller` holds what the KL divergence costs. Its state, with that of the reward, is `states`, which a run saves.
    `room` is that of the learner whose passes the observed ones must equal.
    """

    def __init__(self, task: Task[C], cast: Cast, mesh: Mesh, minibatches: int = 1, room: Room | None = None) -> None:
        config = task.config
        self.cast, self.mesh, self.minibatches = cast, mesh, minibatches
        self.budget, self.failed = config.run.microbatch_tokens, 0
        self.room = room or Room()
        if isinstance(self.room.relieve, Relief):
            for model in cast.models.modules():
                if isinstance(model, Decoder):
                    self.room.relieve.add(model)
        scorer = cast.reward.scorer
        if isinstance(scorer, AdapterScorer | ModelScorer):
            scorer.room = self.room.beside("scoring")
        self.shortages, self.copied = 0, 0.0
        """Of the step under way: how many there had been before it was observed, and the tokens of prompts that stand
        in several parts of a micro-batch since."""
        self.stream = task.stream(mesh.rank, mesh.world)
        self.actor = Actor(cast.policy, task.tokenizer, task.template, config.rollout, config.run.seed, mesh)
        self.controller = KLController(config.kl.beta, config.kl.target, config.kl.horizon)
        self.states = {"kl": self.controller, "reward": cast.reward}
        self.health, self.phases = Health(), Phases(mesh.device)
        self.rollouts: list[Rollout] = []

    @property
    def fingerprint(self) -> str:
        """A name for everything that decides which prompts a step holds."""
        return self.stream.fingerprint

    def experience(self, step: int, observe: Callable[[RolloutBatch], RolloutBatch]) -> Minibatches:
        """The step's minibatches, as the policy answers and as `observe` completes each micro-batch."""
        self.phases.seconds.clear()
        with self.phases("rollout"):
            answered = self.actor.answer([prompt for _, prompt in self.stream.step(step)], step)
        with self.phases("scoring"):
            failures = self.cast.reward.failures
            scores = self.cast.reward.score(answered)
            self.failed = self.cast.reward.failures - failures
        self.rollouts = [replace(rollout, score=score) for rollout, score in zip(answered, scores, strict=True)]
        with self.phases("observing"):
            arranged = arrange(self.rollouts, self.minibatches, self.budget, self.mesh)
            self.shortages = self.room.shortages
            observed = [[found for _, found in self.room.each(minibatch, observe)] for minibatch in arranged]
            self.copied = float(_num_positions(observed) - _num_positions(arranged))
            return observed

    def metrics(
        self, step: int, minibatches: Minibatches, updates: Sequence[Mapping[str, float]], **more: Sequence[Any]
    ) -> dict[str, float]:
        """What there is to log of a step: vital signs, the updates' means, seconds by phase. Warns where it is unwell.

        `failed` are the answers that the reward could not score; those that a rule leaves out are none of them.
        `updates` are the learner's, and `more` those of others by name, which becomes the prefix of their metrics.
        """
        # The update's first pass is the one that the old log-probs came from: any other ratio than 1 is our mistake.
        # Where memory ran out on the way, micro-batches are smaller, or padded as what was given back did not do: both
        # round in another way.
        exact = bool(updates) and self.room.shortages == self.shortages
        assert not exact or updates[0]["approx_kl"] == 0, f"the first ratio is not 1: {updates[0]['approx_kl']}"
        signs = vital_signs(self.rollouts, [b for minibatch in minibatches for b in minibatch], self.mesh)
        found = signs | {"failed": float(self.failed), "beta": self.controller.beta}
        for prefix, own in {"": updates, **{f"{name}_": others for name, others in more.items()}}.items():
            found |= averaged(own, prefix)
            if own:  # as many tokens as there are where memory suffices
                found[f"{prefix}tokens"] -= self.copied * len(own) / len(minibatches)
        found.setdefault("tokens", found.pop("value_tokens", 0.0))
        found.setdefault("loss", found.get("value_loss", 0.0))
        found |= {f"{name}_seconds": seconds for name, seconds in self.phases.seconds.items()}
        answers = self.mesh.sum(torch.tensor(float(len(self.rollouts)), device=self.mesh.device)).item()
        self.controller.update(signs["kl"], int(answers))
        if self.mesh.is_main:
            tqdm.write(f"step {step + 1}: {line(found)}")
            for warning in self.health.warnings(found, step):
                tqdm.write(f"warning: {warning}")
        return found

    def samples(self) -> list[dict[str, Any]]:
        """Some answers of the latest step, for people to read."""
        return [
            {
                "prompt": rollout.prompt.messages[-1].content,
                "answer": rollout.answer,
                "score": rollout.score,
                "ended": rollout.ended,
                "tokens": len(rollout.answer_ids),
            }
            for rollout in self.rollouts[:NUM_SAMPLES]
        ]


def _num_positions(minibatches: Minibatches) -> int:
    return sum(len(batch.tokens) for minibatch in minibatches for batch in minibatch)
