"""Answer prompts with a model, or with an adapter on its base."""

import json
from collections.abc import Sequence

from pydantic import Field

from burnish.config import Settings
from burnish.engine.trained import Trained, check_trained
from burnish.sampling.stops import before_stop
from burnish.settings import TrainedModelSettings

NUM_SLOTS = 64
"""Answers written at once."""


class Config(Settings):
    """Which model answers what, and how it draws."""

    model: TrainedModelSettings = TrainedModelSettings.model_construct()
    prompt: str | tuple[str, ...] = Field(description="What the user says; a list is answered one by one.")
    system: str | None = Field(default=None, description="A system message before it.")
    chat: bool = Field(
        default=True, description="Put the prompt into the chat template; false: continue it as plain text."
    )
    max_tokens: int = Field(default=256, ge=1, description="The longest answer, in tokens.")
    temperature: float = Field(
        default=0.0, ge=0, description="0 takes the most likely token; above it tokens are drawn."
    )
    top_k: int = Field(default=0, ge=0, description="Draw among so many of the most likely tokens; 0: among all.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw among the most likely tokens that hold this share together."
    )
    stop: str | tuple[str, ...] = Field(default=(), description="Texts that end an answer, and are left out of it.")
    samples: int = Field(default=1, ge=1, description="Answers to each prompt; they differ above temperature 0.")
    seed: int = Field(default=0, ge=0, description="Decides what is drawn.")


def main(config: Config, as_json: bool) -> None:
    """Prints each answer."""
    check_trained(config.model)
    stop = (config.stop,) if isinstance(config.stop, str) else config.stop
    if "" in stop:
        raise ValueError("stop: an empty text ends every answer at once; leave it out")

    from burnish.data.chat import end_ids
    from burnish.engine.trained import open_trained
    from burnish.sampling.sampler import Sampler, Sampling, seed_of

    trained = open_trained(config.model)
    prompts = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt)
    ends = end_ids(trained.tokenizer, trained.template) if config.chat else trained.tokenizer.end_ids
    sampling = Sampling(config.max_tokens, config.temperature, config.top_k, config.top_p, ends, stop)
    written = Sampler(trained.decoder, NUM_SLOTS).write(
        [ids for ids in _prompt_ids(config, prompts, trained) for _ in range(config.samples)],
        sampling,
        trained.adapter,
        [seed_of(config.seed, i, k) for i in range(len(prompts)) for k in range(config.samples)],
        trained.tokenizer.decode,
    )
    answers = [answer.ids[:-1] if answer.ids[-1] in ends else answer.ids for answer in written]
    texts = [before_stop(trained.tokenizer.decode(ids), stop).strip() for ids in answers]
    if as_json:
        asked = [prompt for prompt in prompts for _ in range(config.samples)]
        print(json.dumps({"answers": [{"prompt": p, "answer": a} for p, a in zip(asked, texts, strict=True)]}))
    else:
        print("\n\n".join(texts))


def _prompt_ids(config: Config, prompts: Sequence[str], trained: Trained) -> list[list[int]]:
    from burnish.data.chat import prompt_ids
    from burnish.types import Message

    if config.chat:
        before = [Message("system", config.system)] if config.system else []
        chats = [(*before, Message("user", prompt)) for prompt in prompts]
        return [prompt_ids(messages, trained.tokenizer, trained.template) for messages in chats]
    ids = [trained.tokenizer.encode(prompt, add_bos=True) for prompt in prompts]
    if not all(ids):
        raise ValueError("prompt: there is nothing to continue; write prompt=TEXT")
    return ids
