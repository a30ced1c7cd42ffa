"""From prompts to micro-batches of answers: what a step of reinforcement learning is made of."""

import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from burnish.data.chat import end_ids, prompt_ids
from burnish.data.comparing import collate_comparisons
from burnish.data.comparisons import Comparisons
from burnish.data.packing import pack
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.mesh import Mesh
from burnish.engine.roles import Role
from burnish.losses.advantage import moments, on_tokens, whiten
from burnish.losses.kl import ESTIMATORS
from burnish.ops.sequences import sequence_sums
from burnish.sampling.sampler import NoRoomToWrite, Sampler, Sampling
from burnish.sampling.stops import before_stop
from burnish.settings import RolloutSettings
from burnish.types import Batch, Comparison, Prompt, Rollout, RolloutBatch
from burnish.types import Sequence as TokenSequence


class Actor:
    """Has the policy answer prompts, with its own weights as they stand."""

    def __init__(
        self,
        policy: Role,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        settings: RolloutSettings,
        seed: int,
        mesh: Mesh,
    ) -> None:
        self.policy, self.tokenizer, self.template, self.mesh = policy, tokenizer, template, mesh
        self.samples, self.seed = settings.samples, seed
        self.sampler = Sampler(policy.model, settings.slots, mesh)
        ends = end_ids(tokenizer, template)
        self.sampling = Sampling(settings.max_tokens, settings.temperature, end_ids=ends, stop=settings.stop)

    def answer(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """`samples` answers to each prompt, those to one prompt side by side.

        Raises ValueError when no answer of any rank ends by itself although it could: the limit is too short, or the
        model was never taught to end; MemoryError with the settings that need less.
        """
        asked = [prompt_ids(p.messages, self.tokenizer, self.template, p.tools) for p in prompts]
        try:
            written = self.sampler.write(
                [ids for ids in asked for _ in range(self.samples)],
                self.sampling,
                self.policy.adapter,
                [_seed(self.seed, step, self._place(i), k) for i in range(len(prompts)) for k in range(self.samples)],
                self.tokenizer.decode,
            )
        except NoRoomToWrite as error:
            raise MemoryError(_no_room(error, step)) from None
        rollouts = [
            Rollout(
                prompts[i // self.samples],
                tuple(asked[i // self.samples]),
                found.ids,
                self._text(found.ids),
                found.ended,
                group=self._place(i // self.samples),
            )
            for i, found in enumerate(written)
        ]
        can_end = bool(self.sampling.end_ids or self.sampling.stop)
        if can_end and not self.mesh.any(any(rollout.ended for rollout in rollouts)):
            raise ValueError(
                f"all answers of step {step + 1} were cut at rollout.max_tokens={self.sampling.max_tokens}: write a "
                "larger one, or start from a model that was fine-tuned to end its answers (from=RUN of burnish sft)"
            )
        return rollouts

    def _place(self, number: int) -> int:
        """The place in the whole step of this rank's prompt, so that nothing depends on how many ranks there are."""
        return self.mesh.rank + number * self.mesh.world

    def _text(self, ids: Sequence[int]) -> str:
        closed = ids[:-1] if ids and ids[-1] in self.sampling.end_ids else ids
        return before_stop(self.tokenizer.decode(list(closed)), self.sampling.stop).strip()


Minibatches = list[list[RolloutBatch]]


def arrange(rollouts: Sequence[Rollout], minibatches: int, budget: int, mesh: Mesh) -> Minibatches:
    """The micro-batches of each of the step's minibatches, on the device, still without what the update needs.

    Neighbours among the step's prompts, whose order is drawn anew in each epoch, share a minibatch, on however many
    ranks. Answers to one prompt stay together where they fit, so that the prompt is computed once. Every rank gets as
    many micro-batches, if need be some that count for nothing, and a minibatch in which nothing counts is left out.
    Raises ValueError when that leaves none.
    """
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    num_groups = max(mesh.collect(max(groups, default=0))) + 1
    found: Minibatches = []
    for k in range(minibatches):
        chosen = [group for group in sorted(groups) if group * minibatches // num_groups == k]
        members = [part for group in chosen for part in _fitting(groups[group], budget)]
        units = [Comparison(tuple(_sequence(rollout) for rollout in part)) for part in members]
        packs = [
            _rollout_batch([units[i] for i in places], [rollout for i in places for rollout in members[i]])
            for places in pack(Comparisons.of(units).sizes(share_prefix=True), budget)
        ]
        packs += [_rollout_batch([_IDLE], [])] * (max(mesh.collect(len(packs))) - len(packs))
        if mesh.any(any(batch.total_weight for batch in packs)):
            found.append([batch.to(mesh.device) for batch in packs])
    if not found:
        raise ValueError("no answer of this step counts: reward.missing_eos=mask leaves out those that do not end")
    return found


def worth_of(batch: RolloutBatch, beta: float, estimator: str) -> Tensor:
    """What each answer is worth: its score less β times the divergence of its tokens."""
    kl_T = ESTIMATORS[estimator](batch.old_log_probs, batch.reference_log_probs)
    return batch.scores - beta * sequence_sums(torch.where(batch.weights != 0, kl_T, 0.0), batch)


def compared(
    minibatches: Minibatches, worth: Callable[[RolloutBatch], Tensor], compare: Callable[[Tensor, Tensor], Tensor]
) -> Minibatches:
    """The batches with advantages: what `compare` makes of the worth of all the step's answers and their groups.

    Every token of an answer gets the answer's advantage.
    """
    batches = [batch for minibatch in minibatches for batch in minibatch]
    advantages = compare(torch.cat([worth(batch) for batch in batches]), torch.cat([batch.groups for batch in batches]))
    parts = iter(advantages.split([batch.num_sequences for batch in batches]))
    return [[replace(b, advantages=on_tokens(next(parts), b)) for b in minibatch] for minibatch in minibatches]


def whitened(minibatches: Minibatches, mesh: Mesh) -> Minibatches:
    """The advantages with mean 0 and deviation 1 over all tokens of the step, on all ranks."""
    every = [moments(batch.advantages, batch.weights) for minibatch in minibatches for batch in minibatch]
    known = mesh.sum(torch.stack(every).sum(0))
    return [[replace(b, advantages=whiten(b.advantages, b.weights, known)) for b in m] for m in minibatches]


def passes(minibatches: Minibatches, epochs: int, seed: tuple[int, int]) -> Iterator[list[RolloutBatch]]:
    """Every minibatch once per epoch, in an order drawn anew for each."""
    for epoch in range(epochs):
        order = list(range(len(minibatches)))
        if epoch:
            random.Random(f"{seed} {epoch}").shuffle(order)
        yield from (minibatches[k] for k in order)


def num_tokens(batch: RolloutBatch) -> float:
    """How many tokens of answers a batch trains on."""
    return batch.total_weight


def num_values(batch: RolloutBatch) -> float:
    """How many values a batch trains."""
    return float(batch.value_weights.sum())


def num_answers(batch: RolloutBatch) -> float:
    """How many answers a batch trains on."""
    return float((~batch.scores.isnan()).sum())


def averaged(updates: Sequence[Mapping[str, float]], prefix: str = "") -> dict[str, float]:
    """The metrics of a step's updates: their means, but the tokens in all, and the last learning rate.

    Each has the prefix once, also where it is part of its own name.
    """
    names = updates[0] if updates else ()
    means = {name: sum(update[name] for update in updates) / len(updates) for name in names}
    found = {prefix + name.removeprefix(prefix): mean for name, mean in means.items()}
    last = {prefix + "learning_rate": updates[-1]["learning_rate"]} if updates else {}
    return found | last | ({prefix + "tokens": sum(update["tokens"] for update in updates)} if updates else {})


@dataclass
class Phases:
    """Seconds that each phase of a step took."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        """Count what happens inside for this phase."""
        began = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _sequence(rollout: Rollout) -> TokenSequence:
    counts = 0.0 if rollout.score is None else 1.0
    weights = (0.0,) * len(rollout.prompt_ids) + (counts,) * len(rollout.answer_ids)
    return TokenSequence((*rollout.prompt_ids, *rollout.answer_ids), weights, row=rollout.group)


def _no_room(error: NoRoomToWrite, step: int) -> str:
    """What ended a run while answers were written, in one line."""
    fewer = [f"rollout.slots={error.num_slots // 2}"] if error.num_slots > 1 else []
    less = [*fewer, f"a data.max_length below {error.tokens}, with rollout.max_tokens"]
    return (
        f"out of memory at step {step + 1}, while answers were written: {error.what}. Any of these needs less: "
        f"{', '.join(less)}; with other settings it starts anew, with another run.folder"
    )


_IDLE = Comparison((TokenSequence((0, 0), (0.0, 0.0), row=0),))
"""What a rank computes while others have more to do."""


def _fitting(group: list[Rollout], budget: int) -> list[list[Rollout]]:
    """The group in parts, each of which fits a micro-batch with its prompt in it once."""
    parts: list[list[Rollout]] = []
    room = 0
    for rollout in group:
        size = len(rollout.answer_ids) + 1
        if not parts or size > room:
            parts.append([])
            room = budget - len(rollout.prompt_ids)
        parts[-1].append(rollout)
        room -= size
    return parts


def _rollout_batch(units: list[Comparison], rollouts: list[Rollout]) -> RolloutBatch:
    batch = collate_comparisons(units, share_prefix=True)
    known = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
    count = batch.num_sequences
    nothing = float("nan")
    scores = [nothing if rollout.score is None else rollout.score for rollout in rollouts] or [nothing] * count
    groups, ended = [r.group for r in rollouts] or [-1] * count, [r.ended for r in rollouts] or [False] * count
    columns = ("old_log_probs", "reference_log_probs", "old_values", "advantages", "returns", "value_weights")
    return RolloutBatch(
        **known,
        scores=torch.tensor(scores),
        groups=torch.tensor(groups),
        ended=torch.tensor(ended),
        **dict.fromkeys(columns, torch.zeros_like(batch.weights)),
    )


def _seed(*parts: int) -> int:
    """One number for (run, step, prompt, sample), different for all that occur together."""
    number = 0
    for part in parts:
        number = (number * 1_000_003 + part + 1) % (1 << 61)
    return number
