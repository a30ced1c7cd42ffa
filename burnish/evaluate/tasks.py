"""Exact match: held-out prompts answered by generation and graded, with the accuracy of each family of tasks."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.chat import end_ids, prompt_ids
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.model.decoder import Decoder
from burnish.sampling.sampler import Sampler, Sampling
from burnish.sampling.streams import seed_of
from burnish.sampling.writing import Asked, Written
from burnish.types import Prompt, Rollout

NUM_SLOTS = 128
Grader = Callable[[Prompt, str], bool]


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, what the model answered, and whether that was right."""

    prompt: Prompt
    text: str
    correct: bool | None
    """None where there is nothing to compare it with."""
    rollout: Rollout
    """The same as token ids."""

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
    rollouts = write_answers(model, tokenizer, template, prompts, adapter, max_tokens)
    return [
        Answer(r.prompt, r.answer, None if r.prompt.answer is None else grade(r.prompt, r.answer), r) for r in rollouts
    ]


def write_answers(
    model: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    prompts: Sequence[Prompt],
    adapter: str | None,
    max_tokens: int,
    temperature: float = 0.0,
) -> list[Rollout]:
    """An answer to each prompt: the most likely tokens, or tokens drawn at a temperature, the same at each call.

    An answer to a prompt that fills the model's positions is empty.
    """
    ids = [prompt_ids(prompt.messages, tokenizer, template, prompt.tools) for prompt in prompts]
    room = [min(max_tokens, model.config.max_positions - len(prompt)) for prompt in ids]
    asked = [
        Asked(prompt, seed_of(0, i), left) for i, (prompt, left) in enumerate(zip(ids, room, strict=True)) if left > 0
    ]
    sampling = Sampling(max_tokens, temperature, end_ids=end_ids(tokenizer, template))
    written = iter(Sampler(model, NUM_SLOTS, graphs=False, dense=False).answer(asked, sampling, adapter))
    answers = [next(written) if left > 0 else Written((), False) for left in room]
    texts = [tokenizer.decode(list(answer.ids[: len(answer.ids) - answer.ended])).strip() for answer in answers]
    return [
        Rollout(prompt, tuple(read), answer.ids, text, answer.ended, group=i)
        for i, (prompt, read, answer, text) in enumerate(zip(prompts, ids, answers, texts, strict=True))
    ]


def accuracy(answers: Sequence[Answer]) -> float:
    """The share of right answers."""
    return sum(bool(answer.correct) for answer in answers) / max(1, len(answers))


def accuracy_by_task(answers: Sequence[Answer]) -> dict[str, float]:
    """The share of right answers in each family of tasks that the prompts name."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.prompt.task or "all"].append(answer)
    return {task: accuracy(group) for task, group in sorted(groups.items())}
