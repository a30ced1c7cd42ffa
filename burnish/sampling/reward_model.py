"""Reward models as rewards: an adapter in the policy's own model, or a model with a tokenizer of its own."""

from collections.abc import Sequence
from pathlib import Path

import torch

from burnish.data.chat import encode_row
from burnish.data.packing import collate, pack
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.assemble import activation_dtype
from burnish.engine.mesh import Mesh
from burnish.engine.rewards import REWARD, normaliser
from burnish.engine.roles import Role
from burnish.engine.room import Room
from burnish.model.checkpoint import load_model
from burnish.ops.sequences import sequence_last
from burnish.types import Batch, Example, Message, Rollout
from burnish.types import Sequence as TokenSequence

Ids = Sequence[int]


class AdapterScorer:
    """Scores the very token ids that the policy read and wrote, at the last of them."""

    def __init__(self, folder: Path, role: Role, mesh: Mesh, microbatch_tokens: int) -> None:
        self.name, self.problem = f"the reward adapter in {folder}", None
        self.normaliser, self.role, self.mesh, self.microbatch_tokens = (
            normaliser(folder),
            role,
            mesh,
            microbatch_tokens,
        )
        self.room = Room()

    problem: str | None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The normalised scores of the answers."""
        ids = [(*rollout.prompt_ids, *rollout.answer_ids) for rollout in rollouts]
        scores = last_values(self.role, ids, self.microbatch_tokens, self.mesh, self.room)
        return [self.normaliser(score) for score in scores]


class ModelScorer:
    """Writes each conversation in the reward model's own template and tokens, and scores it at its end."""

    def __init__(
        self, folder: Path, role: Role, tokenizer: Tokenizer, template: ChatTemplate, microbatch_tokens: int
    ) -> None:
        self.name, self.problem = f"the reward model in {folder}", None
        self.normaliser, self.role, self.microbatch_tokens = normaliser(folder), role, microbatch_tokens
        self.tokenizer, self.template, self.room = tokenizer, template, Room()

    problem: str | None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The normalised scores of the answers; None for one that its template or its context does not take."""
        found = [self._ids(rollout) for rollout in rollouts]
        readable = [ids for ids in found if ids is not None]
        scores = iter(last_values(self.role, readable, self.microbatch_tokens, room=self.room))
        return [None if ids is None else self.normaliser(next(scores)) for ids in found]

    def _ids(self, rollout: Rollout) -> list[int] | None:
        """The conversation as the reward model's tokens, its end token included where the answer did end."""
        messages = (*rollout.prompt.messages, Message("assistant", rollout.answer))
        try:
            encoded = encode_row(
                Example(messages, rollout.prompt.tools), self.tokenizer, self.template, "last_assistant"
            )
        except ValueError as error:
            self.problem = f"{self.name} cannot read a conversation: {error}"
            return None
        end = max((k for k, weight in enumerate(encoded.weights) if weight), default=len(encoded.ids) - 1) + 1
        ids = encoded.ids[: end if rollout.ended or not encoded.ends else end - 1]
        limit = self.role.model.config.max_positions
        if len(ids) > limit:
            self.problem = f"{self.name} is made for {limit} tokens, and a conversation has {len(ids)}"
            return None
        return ids


def open_model_scorer(folder: Path, storage: str, device: torch.device, microbatch_tokens: int) -> ModelScorer:
    """The reward model of a folder, whole on this rank's device."""
    tokenizer = Tokenizer.load(folder)
    dtype = activation_dtype("auto", device)
    model = load_model(folder, storage, device, dtype, head=REWARD).eval()
    template = ChatTemplate.open("auto", tokenizer)
    return ModelScorer(folder, Role(model, None, REWARD), tokenizer, template, microbatch_tokens)


@torch.no_grad()
def last_values(
    role: Role,
    sequences: Sequence[Ids],
    microbatch_tokens: int,
    mesh: Mesh | None = None,
    room: Room | None = None,
) -> list[float]:
    """What the role's head reads at the last token of each sequence, in fp32.

    With `mesh` the model may be laid over ranks, all of which must call it: a rank with fewer batches goes through the
    model as often as the others.
    """
    model, room, found = role.model, room or Room(), [0.0] * len(sequences)
    lengths = [len(ids) for ids in sequences]
    packs = pack(lengths, max([microbatch_tokens, *lengths]))
    passes = max(mesh.collect(len(packs))) if mesh is not None and mesh.world > 1 else len(packs)
    training = model.training
    model.eval()

    def read(batch: Batch) -> list[float]:
        return sequence_last(role.values(batch), batch).tolist()

    for number in range(passes):
        members = packs[number] if number < len(packs) else []
        rows = [TokenSequence(tuple(sequences[i]), (0.0,) * lengths[i], 0) for i in members]
        batch = collate(rows or [TokenSequence((0,), (0.0,), 0)]).to(model.device)
        scores = [score for _, part in room.each([batch], read) for score in part]  # also where nobody asks for them
        for member, score in zip(members, scores, strict=False):
            found[member] = score
    model.train(training)
    return found
