"""What every recipe of reinforcement learning opens before torch is loaded: settings, tokenizer, template, prompts."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from burnish.data.prompts import PreparedPrompts, PromptStream, prepare_prompts
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.preflight import check_positions, preflight
from burnish.engine.start import Start, begin
from burnish.sampling.scoring import check_reward
from burnish.settings import ReinforcementSettings

C = TypeVar("C", bound=ReinforcementSettings)


@dataclass(frozen=True, slots=True)
class Task(Generic[C]):
    """What is to be learnt, and from where."""

    config: C
    start: Start
    tokenizer: Tokenizer
    template: ChatTemplate
    data: PreparedPrompts

    def stream(self, rank: int, world: int) -> PromptStream:
        """The prompts of each step."""
        return PromptStream(self.data.train, self.config.rollout.prompts, self.config.run.seed, rank, world)

    @property
    def steps(self) -> int:
        """How many steps the run takes."""
        steps = self.config.run.steps
        return self.stream(0, 1).steps_in(self.config.run.epochs) if steps is None else steps


def open_task(config: C) -> Task[C]:
    """The task that the settings describe. Raises ValueError for whatever can be known to be wrong without torch."""
    config, start = begin(config)
    preflight(config)
    check_reward(config.reward)
    tokenizer = Tokenizer.load(start.words)
    template = ChatTemplate.open(config.model.template, tokenizer)
    longest = config.data.max_length - config.rollout.max_tokens
    data = prepare_prompts(config.data, config.evaluate, tokenizer, template, config.run.seed, longest)
    check_positions(start.base, int(data.tokens.lengths.max(initial=0)) + config.rollout.max_tokens)
    return Task(config, start, tokenizer, template, data)
