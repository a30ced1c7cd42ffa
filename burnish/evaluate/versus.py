"""What preference learning is judged by on held-out prompts: reward, win rate against the reference, KL from it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from burnish import world
from burnish.data.packing import collate, pack
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.roles import Role
from burnish.engine.room import Room
from burnish.evaluate.tasks import write_answers
from burnish.types import Batch, Prompt, Rollout
from burnish.types import Sequence as TokenSequence

NUM_DRAWN = 128
"""Prompts that are answered by drawing, to estimate the KL divergence."""

Scores = list[float | None]
Scorer = Callable[[Sequence[Rollout]], Scores]
"""What each answer is worth; None where that could not be found out."""


class Versus:
    """Measures a policy against the reference that it started from, on the same prompts each time it is asked.

    The reference's greedy answers are written and scored once. Without a reference, as with full weights, which are
    what they were only until the first step, nothing is said of the divergence; wins are against `start_scores`, those
    of the first time. Without a scorer nothing is said of rewards.
    """

    def __init__(
        self,
        policy: Role,
        reference: Role | None,
        scorer: Scorer | None,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_tokens: int,
        microbatch_tokens: int,
    ) -> None:
        # Answers are drawn and scored at temperature 1, whatever the temperature of training: what people will use.
        self.policy = replace(policy, temperature=1.0)
        self.reference = replace(reference, temperature=1.0) if reference is not None else None
        self.scorer, self.tokenizer, self.template = scorer, tokenizer, template
        self.max_tokens, self.microbatch_tokens = max_tokens, microbatch_tokens
        self.start_scores: Scores | None = None
        self.room = Room()

    def measure(self, answers: Sequence[Rollout]) -> tuple[dict[str, float], Scores]:
        """The metrics of the policy, given its greedy answers to the held-out prompts, and the score of each.

        `eval_reward`: the mean score. `eval_win_rate`: the share of prompts where it scores higher than the
        reference's answer, ties half. `eval_kl`: see `divergence`. `eval_answer_tokens`: the mean length. Answers that
        could not be scored are left out of the first two, and counted in `eval_unscored`.
        """
        prompts = [answer.prompt for answer in answers]
        metrics = {"eval_answer_tokens": sum(len(a.answer_ids) for a in answers) / max(1, len(answers))}
        moved = self.start_scores is not None
        if self.reference is not None:
            metrics["eval_kl"], moved = self.divergence(prompts, self.reference)
        if self.scorer is None:
            return metrics, [None] * len(answers)
        scores = self.scorer(answers)
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            metrics["eval_unscored"] = len(scores) - len(known)
        if known:
            metrics["eval_reward"] = sum(known) / len(known)
        if self.start_scores is None:
            self.start_scores = self._scores_of_reference(prompts) if moved else scores
        if (rate := win_rate(scores, self.start_scores)) is not None:
            metrics["eval_win_rate"] = rate
        return metrics, scores

    @torch.no_grad()
    def divergence(self, prompts: Sequence[Prompt], reference: Role) -> tuple[float, bool]:
        """KL(π ‖ π_ref) of an answer, in nats, and whether the two differ in any log-prob.

        The mean, over answers drawn from π, of Σ_t log π(y_t) - log π_ref(y_t): the end token counts. At most NUM_DRAWN
        prompts are answered, evenly taken from all.
        """
        chosen = [prompts[i * len(prompts) // NUM_DRAWN] for i in range(NUM_DRAWN)]
        chosen = chosen if len(prompts) > NUM_DRAWN else list(prompts)
        model = self.policy.model
        drawn = write_answers(
            model, self.tokenizer, self.template, chosen, self.policy.adapter, self.max_tokens, temperature=1.0
        )
        sequences = [_scored(answer) for answer in drawn if answer.answer_ids]
        longest = max((len(sequence.ids) for sequence in sequences), default=0)
        total, moved = 0.0, False
        modes = [(role.model, role.model.training) for role in (self.policy, reference)]
        for decoder, _ in modes:
            decoder.eval()
        packs = pack([len(s.ids) for s in sequences], max(longest, self.microbatch_tokens))
        batches = (collate([sequences[i] for i in members]).to(model.device) for members in packs)

        def log_ratios(batch: Batch) -> torch.Tensor:
            ratio_T = self.policy.log_probs(batch).double() - reference.log_probs(batch).double()
            return ratio_T.where(batch.weights != 0, 0.0)

        for _, ratio_T in self.room.each(batches, log_ratios):
            total, moved = total + ratio_T.sum().item(), moved or bool(ratio_T.any())
        for decoder, mode in modes:
            decoder.train(mode)
        return total / max(1, len(sequences)), moved

    def _scores_of_reference(self, prompts: Sequence[Prompt]) -> Scores:
        """The scores of the reference's own greedy answers."""
        role = self.reference
        assert role is not None
        assert self.scorer is not None
        written = write_answers(role.model, self.tokenizer, self.template, prompts, role.adapter, self.max_tokens)
        return self.scorer(written)


def win_rate(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """The share of prompts where our answer scores higher, ties half; None where no prompt has two scores."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs) if pairs else None


def gold(rollouts: Sequence[Rollout]) -> Scores:
    """What answers to prompts of the embedded world are worth to its own graders."""
    return [
        world.worth(rollout.prompt.task, rollout.prompt.answer, rollout.answer)
        if rollout.prompt.task is not None and rollout.prompt.answer is not None
        else None
        for rollout in rollouts
    ]


def has_gold(prompts: Sequence[Prompt]) -> bool:
    """Whether the embedded world can say what answers to all these prompts are worth."""
    return all(prompt.task in world.FAMILIES and prompt.answer is not None for prompt in prompts)


def _scored(answer: Rollout) -> TokenSequence:
    """Prompt and answer as one sequence, each token of the answer weighing 1."""
    prompt, written = answer.prompt_ids, answer.answer_ids
    return TokenSequence(prompt + written, (0.0,) * len(prompt) + (1.0,) * len(written), row=0)
