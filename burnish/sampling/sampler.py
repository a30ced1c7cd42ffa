"""Answers to prompts, written with the model's own weights and adapters: nothing is merged or copied."""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from burnish.engine.memory import free_bytes
from burnish.engine.mesh import Mesh
from burnish.engine.room import ran_out
from burnish.model.decoder import Decoder
from burnish.model.storage import densified, scratch_bytes
from burnish.sampling.slots import Sampling
from burnish.sampling.stops import Stops
from burnish.sampling.streams import seed_of
from burnish.sampling.writing import Asked, Means, Writing, Written, slots_for

__all__ = ["NoRoomToWrite", "Sampler", "Sampling", "Written", "generate"]

SCRATCH_MARGIN = 1.25
"""So many times the memory for weights in the model's dtype must be free for them, the cache being there already."""


class NoRoomToWrite(MemoryError):
    """Memory does not suffice for so many answers at once, each of so many tokens with its prompt."""

    def __init__(self, num_slots: int, tokens: int) -> None:
        self.num_slots, self.tokens = num_slots, tokens
        self.what = f"{num_slots} answer{'s' * (num_slots > 1)} at once, of up to {tokens:,} tokens with the prompt"
        super().__init__(
            f"out of memory while answers were written: {self.what}; a smaller max_tokens, shorter prompts or "
            "model.storage=nf4 needs less"
        )


class Sampler:
    """Writes answers with a model as it stands, `num_slots` at a time.

    The slots are decoded together over one cache. A finished one is given the next prompt that waits, so that long
    answers hold up nothing; when none waits the batch shrinks.

    What is drawn for an answer depends on its prompt, its seed and the sampling alone: not on its slot, on what is
    written beside it, on the order of prompts or on the rank. One thing is left: logits are rounded differently in
    batches of different shapes, so that a token that all but equals another in probability, or whose border in the
    running sum of probabilities all but equals the random number, can come out differently. With `invariant` prompts
    are read one by one, and every step decodes all slots over all their places: the same bits for the same `num_slots`,
    as long as the longest prompt and `max_tokens` add up to the same multiple of `writing.ROOM`. It costs what shorter
    contexts, fewer slots and prompts read together save.

    With a mesh of several ranks, whose weights may be sharded, all must call `write` together; each has prompts of its
    own, any number of them.

    On a GPU steps are replayed as CUDA graphs (`graphs`; not with several ranks), and weights that are not kept in the
    model's dtype are turned into it once per call where the memory for that is free (`dense`; True: in any case).
    Neither changes a number. A call leaves no memory in use.
    """

    def __init__(
        self,
        model: Decoder,
        num_slots: int,
        mesh: Mesh | None = None,
        invariant: bool = False,
        graphs: bool = True,
        dense: bool | None = None,
    ) -> None:
        assert num_slots >= 1
        self.model, self.num_slots, self.mesh = model, num_slots, mesh
        self.invariant, self.graphs, self.dense = invariant, graphs, dense

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        adapter: str | None,
        seeds: Sequence[int],
        decode: Callable[[list[int]], str] | None = None,
    ) -> list[Written]:
        """An answer to each prompt, in their order.

        `decode` turns ids into text, to look for stop strings in. Raises ValueError for a prompt that is empty, or that
        together with `max_tokens` is longer than the model's positions; NoRoomToWrite where memory does not suffice.
        """
        for number, prompt in enumerate(prompts):
            _check(number, len(prompt), sampling.max_tokens, self.model.config.max_positions)
        asked = [Asked(prompt, seed, sampling.max_tokens) for prompt, seed in zip(prompts, seeds, strict=True)]
        return self.answer(asked, sampling, adapter, decode)

    @torch.no_grad()
    def answer(
        self,
        asked: Sequence[Asked],
        sampling: Sampling,
        adapter: str | None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> list[Written]:
        """The same, with a limit for each answer in place of `max_tokens`; every prompt must have room for it."""
        assert decode is not None or not sampling.stop
        stops = Stops(sampling.stop, decode) if decode is not None and sampling.stop else None
        means = Means(self.model, adapter, self.num_slots, self.mesh, self.invariant, self.graphs)
        try:
            with _evaluating(self.model):
                writing = Writing(means, asked, sampling, stops)
                with densified(self.model, self.model.dtype if self._wants_scratch() else None):
                    return writing.run()
        except RuntimeError as error:
            if not ran_out(error):
                raise
            longest = max((len(one.prompt) + one.limit for one in asked), default=0)
            raise NoRoomToWrite(slots_for(means, len(asked)), longest) from None

    def _wants_scratch(self) -> bool:
        device = self.model.device
        sharded = self.mesh is not None and self.mesh.world > 1
        if self.dense is not None or sharded or device.type != "cuda":
            return bool(self.dense) and not sharded
        return SCRATCH_MARGIN * scratch_bytes(self.model, self.model.dtype) < free_bytes(device)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    end_ids: Collection[int],
    adapter: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    num_slots: int = 128,
) -> list[list[int]]:
    """What the model writes after each prompt, without the end token, in the order of the prompts.

    At temperature 0 the most likely token is taken; above it tokens are drawn from softmax(logits / temperature), each
    prompt from a random stream of its own (seed, place in `prompts`): see `Sampler`. An answer ends at one of
    `end_ids`, after `max_tokens`, or where the model's positions do.
    """
    room = [model.config.max_positions - len(prompt) for prompt in prompts]
    asked = [
        Asked(prompt, seed_of(seed, i), min(max_tokens, room[i])) for i, prompt in enumerate(prompts) if room[i] > 0
    ]
    sampler = Sampler(model, num_slots, graphs=False, dense=False)
    written = iter(sampler.answer(asked, Sampling(max_tokens, temperature, end_ids=end_ids), adapter))
    found = [next(written) if left > 0 else Written((), False) for left in room]
    return [list(one.ids[: len(one.ids) - one.ended]) for one in found]


def _check(number: int, length: int, max_tokens: int, positions: int) -> None:
    if length == 0:
        raise ValueError(f"prompt {number} is empty: there is nothing to continue")
    if length + max_tokens > positions:
        room = positions - length
        hint = f"write max_tokens={room} or less" if room > 0 else "leave it out, or use a model with more positions"
        raise ValueError(
            f"prompt {number}: its {length} tokens and max_tokens={max_tokens} go beyond the {positions} positions of "
            f"the model: {hint}"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """The model without dropout; then again in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
