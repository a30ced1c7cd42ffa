"""What a model is worth before and after training: held-out loss, answers to held-out prompts, forgetting, rewards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from burnish import world
from burnish.data.chat import encode
from burnish.data.files import EMBEDDED
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.roles import Role
from burnish.engine.room import Room
from burnish.evaluate.likelihood import held_out_loss
from burnish.evaluate.tasks import accuracy, accuracy_by_task, answer_prompts, exact_match
from burnish.evaluate.versus import Scorer, Versus, gold, has_gold
from burnish.model.decoder import Decoder
from burnish.settings import EvaluateSettings
from burnish.types import Prompt, Text
from burnish.types import Sequence as TokenSequence

if TYPE_CHECKING:
    from burnish.sampling.cast import Cast
    from burnish.sampling.task import Task

NUM_SAMPLES = 24
"""Answers kept for people to read."""


class Judge:
    """Gives a verdict on a model as it stands; the same questions each time it is asked.

    `budget` is the longest sequence, and the tokens of a forward pass: on the second, no result depends.
    """

    def __init__(
        self,
        model: Decoder,
        adapter: str | None,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        held_out: Sequence[TokenSequence],
        prompts: Sequence[Prompt],
        settings: EvaluateSettings,
        budget: tuple[int, int],
    ) -> None:
        self.model, self.adapter, self.tokenizer, self.template = model, adapter, tokenizer, template
        self.held_out, self.prompts, self.longest, self.microbatch_tokens = held_out, prompts, *budget
        self.max_tokens = settings.max_tokens
        general = settings.general
        self.general = general_sequences(general, tokenizer, template, self.longest) if general else []
        self.versus: Versus | None = None
        self.scorer_name = ""
        self.room = Room()

    def beside(self, room: Room) -> Self:
        """The same judge, for whom room is made as for a learner with this one."""
        self.room = room.beside("evaluation")
        if self.versus is not None:
            self.versus.room = self.room
        return self

    def against(self, reference: Role | None, scorer: Scorer | None = None, scorer_name: str = "") -> Self:
        """The same judge, whose verdicts also measure rewards, and the policy against this reference: see `Versus`.

        Without a scorer the embedded world's graders are asked, where they know all prompts.
        """
        if scorer is None and self.prompts and has_gold(self.prompts):
            scorer, scorer_name = gold, "the embedded world"
        policy, text = Role(self.model, self.adapter), (self.tokenizer, self.template)
        self.versus = Versus(policy, reference, scorer, *text, self.max_tokens, self.microbatch_tokens)
        self.versus.room, self.scorer_name = self.room, scorer_name
        return self

    def losses(self) -> dict[str, float]:
        """Loss, perplexity and accuracy on the held-out rows, and the loss on general text, named for metrics.jsonl."""
        metrics: dict[str, float] = {}
        if self.held_out:
            found = held_out_loss(self.model, self.held_out, self.adapter, self.microbatch_tokens, self.room)
            metrics |= {f"eval_{name}": value for name, value in found.items()}
        if self.general:
            found = held_out_loss(self.model, self.general, self.adapter, self.microbatch_tokens, self.room)
            metrics["eval_general_loss"] = found["loss"]
        return metrics

    def verdict(self, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The losses, the share of prompts answered right, overall and by task, what `against` asks for, and samples.

        Prompts without a reference answer are answered, but not graded. `before` is the verdict before training, where
        a continued run must be told what `against` no reference has to win against.
        """
        found: dict[str, Any] = {"metrics": self.losses(), "samples": []}
        if not self.prompts:
            return found
        answers = answer_prompts(
            self.model, self.tokenizer, self.template, self.prompts, self.adapter, self.max_tokens, grade
        )
        if graded := [answer for answer in answers if answer.correct is not None]:
            found["metrics"]["eval_exact_match"] = accuracy(graded)
            found["by_task"] = accuracy_by_task(graded)
            for name, tasks in (("seen", world.SEEN), ("unseen", world.UNSEEN)):
                if chosen := [answer for answer in graded if answer.prompt.task in tasks]:
                    found["metrics"][f"eval_exact_match_{name}"] = accuracy(chosen)
        shown = [answer.as_dict() for answer in answers]
        if self.versus is not None:
            if before is not None and "scores" in before:
                self.versus.start_scores = before["scores"]
            metrics, scores = self.versus.measure([answer.rollout for answer in answers])
            found["metrics"] |= metrics
            if self.versus.scorer is not None:
                found |= {"scorer": self.scorer_name, "scores": scores}
            shown = [{**sample, "reward": score} for sample, score in zip(shown, scores, strict=True)]
        found["samples"] = shown[:: max(1, len(shown) // NUM_SAMPLES)][:NUM_SAMPLES]
        return found


def open_judge(task: "Task[Any]", cast: "Cast", room: Room) -> Judge:
    """The judge of a policy that learns from its own answers, for whom room is made as for its learner.

    Answers to the embedded world's prompts are scored by its graders, which the policy does not learn from; all others
    by the reward that it learns from.
    """
    config, prompts = task.config, task.data.held_out[: task.config.evaluate.prompts]
    lengths = (config.data.max_length, max(config.run.microbatch_tokens, config.data.max_length))
    policy, text = cast.policy, (task.tokenizer, task.template)
    judge = Judge(policy.model, policy.adapter, *text, [], prompts, config.evaluate, lengths).beside(room)
    of_the_world = (config.evaluate.path or config.data.path) == EMBEDDED
    if prompts and of_the_world and has_gold(prompts):
        return judge.against(cast.reference)
    return judge.against(cast.reference, cast.reward.measure, cast.reward.scorer.name)


def grade(prompt: Prompt, answer: str) -> bool:
    """Whether an answer is right: by the task's own checker where the embedded world has one, else by exact match."""
    if prompt.task is not None and prompt.task in world.FAMILIES and prompt.answer is not None:
        return world.check(prompt.task, prompt.answer, answer)
    return exact_match(prompt, answer)


def general_sequences(source: str, tokenizer: Tokenizer, template: ChatTemplate, longest: int) -> list[TokenSequence]:
    """General text as sequences of at most `longest` tokens, every token after a document's first scored once.

    `source` is `embedded`, or a text file, of which every paragraph between blank lines is a document of its own. What
    is longer goes on in a sequence that begins with the last token of the one before it.
    """
    documents = world.general_documents() if source == "embedded" else Path(source).read_text("utf-8").split("\n\n")
    found = [encode(Text(((text, True),)), tokenizer, template) for text in documents if text.strip()]
    return [
        TokenSequence(whole.ids[i : i + longest], whole.weights[i : i + longest], number)
        for number, whole in enumerate(found)
        for i in range(0, max(1, len(whole.ids) - 1), longest - 1)
    ]
