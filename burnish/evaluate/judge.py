"""What a model is worth before and after training: held-out loss, answers to held-out prompts, forgetting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish import world
from burnish.data.chat import encode
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.evaluate.likelihood import held_out_loss
from burnish.evaluate.tasks import accuracy, accuracy_by_task, answer_prompts, exact_match
from burnish.model.decoder import Decoder
from burnish.settings import EvaluateSettings
from burnish.types import Prompt, Text
from burnish.types import Sequence as TokenSequence

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

    def losses(self) -> dict[str, float]:
        """Loss, perplexity and accuracy on the held-out rows, and the loss on general text, named for metrics.jsonl."""
        metrics: dict[str, float] = {}
        if self.held_out:
            found = held_out_loss(self.model, self.held_out, self.adapter, self.microbatch_tokens)
            metrics |= {f"eval_{name}": value for name, value in found.items()}
        if self.general:
            found = held_out_loss(self.model, self.general, self.adapter, self.microbatch_tokens)
            metrics["eval_general_loss"] = found["loss"]
        return metrics

    def verdict(self) -> dict[str, Any]:
        """The losses, the share of prompts answered right, overall and by task, and some answers to read."""
        found: dict[str, Any] = {"metrics": self.losses(), "samples": []}
        if self.prompts:
            answers = answer_prompts(
                self.model, self.tokenizer, self.template, self.prompts, self.adapter, self.max_tokens, grade
            )
            found["metrics"]["eval_exact_match"] = accuracy(answers)
            found["by_task"] = accuracy_by_task(answers)
            for name, tasks in (("seen", world.SEEN), ("unseen", world.UNSEEN)):
                if chosen := [answer for answer in answers if answer.prompt.task in tasks]:
                    found["metrics"][f"eval_exact_match_{name}"] = accuracy(chosen)
            step = max(1, len(answers) // NUM_SAMPLES)
            found["samples"] = [answer.as_dict() for answer in answers[::step][:NUM_SAMPLES]]
        return found


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
