"""Answer prompts with a model, or with an adapter on its base."""

import json

from pydantic import Field

from burnish.config import Settings
from burnish.engine.trained import check_trained
from burnish.settings import TrainedModelSettings


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
    seed: int = Field(default=0, ge=0, description="Decides what is drawn.")


def main(config: Config, as_json: bool) -> None:
    """Prints each answer."""
    check_trained(config.model)

    from burnish.data.chat import end_ids, prompt_ids
    from burnish.engine.trained import open_trained
    from burnish.sampling.sampler import generate
    from burnish.types import Message

    trained = open_trained(config.model)
    prompts = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt)
    before = [Message("system", config.system)] if config.system else []
    if not config.chat:
        ids = [trained.tokenizer.encode(prompt, add_bos=True) for prompt in prompts]
        if not all(ids):
            raise ValueError("prompt: there is nothing to continue; write prompt=TEXT")
    else:
        chats = [(*before, Message("user", prompt)) for prompt in prompts]
        ids = [prompt_ids(messages, trained.tokenizer, trained.template) for messages in chats]
    ends = end_ids(trained.tokenizer, trained.template) if config.chat else trained.tokenizer.end_ids
    options = (trained.adapter, config.temperature, config.seed)
    written = generate(trained.decoder, ids, config.max_tokens, ends, *options)
    answers = [trained.tokenizer.decode(answer).strip() for answer in written]
    if as_json:
        print(json.dumps({"answers": [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]}))
    else:
        print("\n\n".join(answers))
