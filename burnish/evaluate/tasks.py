"""Exact match: held-out prompts answered by generation and graded, with the accuracy of each family of tasks."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.chat import end_ids, prompt_ids
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.model.decoder import Decoder
from burnish.sampling.sampler import generate
from burnish.types import Prompt

Grader = Callable[[Prompt, str], bool]


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, what the model answered, and whether that was right."""

    prompt: Prompt
    text: str
    correct: bool

    def as_dict(self) -> dict[str, Any]:
        """The answer as a JSON object."""
        question = "\n".join(message.content for message in self.prompt.messages)
        reference, task = self.prompt.answer, self.prompt.task
        return {"task": task, "prompt": question, "reference": reference, "answer": self.text, "correct": self.correct}


def exact_match(prompt: Prompt, answer: str) -> bool:
    """Whether an answer is the reference, but for the spaces around it and in between."""
    return prompt.answer is not None and answer.split() == prompt.answer.split()


def answer_prompts(
    model: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompts: Sequence[Prompt],
    adapter: str | None,
    max_tokens: int = 64,
    grade: Grader = exact_match,
) -> list[Answer]:
    """What the model answers to each prompt, greedily, with its grade."""
    training = model.training
    model.eval()
    ids = [prompt_ids(prompt.messages, tokenizer, template, prompt.tools) for prompt in prompts]
    written = generate(model, ids, max_tokens, end_ids(tokenizer, template), adapter)
    model.train(training)
    texts = [tokenizer.decode(answer).strip() for answer in written]
    return [Answer(prompt, text, grade(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]


def accuracy(answers: Sequence[Answer]) -> float:
    """The share of right answers."""
    return sum(answer.correct for answer in answers) / max(1, len(answers))


def accuracy_by_task(answers: Sequence[Answer]) -> dict[str, float]:
    """The share of right answers in each family of tasks that the prompts name."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.prompt.task or "all"].append(answer)
    return {task: accuracy(group) for task, group in sorted(groups.items())}
