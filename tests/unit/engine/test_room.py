"""A step that runs out of memory is taken again in smaller parts: the same sums, to the last bit."""

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.data.comparing import collate_comparisons
from burnish.data.dividing import within
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.room import NoRoom, Room, Shortage
from burnish.losses.likelihood import cross_entropy
from burnish.losses.policy import ppo_loss
from burnish.losses.reward import ranking_loss
from burnish.ops.sequences import sequence_last
from burnish.optim.adamw import adamw
from burnish.types import Batch, Comparison, PreferenceBatch, RolloutBatch, Sequence
from tests.tiny import tiny_batch

VOCABULARY = 50
Objective = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


class Table(nn.Module):
    """Predicts the next token, and how good all is, from the last token alone; a tenth of what it sees is dropped."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def rows(self, batch: Batch) -> Tensor:
        return F.dropout(self.logits[batch.tokens], 0.1)

    def likelihood(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.rows(batch)
        found = rows.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        return cross_entropy(found, batch.weights, rows.argmax(-1) == batch.targets)

    def ranking(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return ranking_loss(sequence_last(self.rows(batch).sum(-1), batch), batch)

    def policy(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.rows(batch).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        return ppo_loss(found, batch.old_log_probs, batch.advantages, batch.weights)


class _Fails(torch.autograd.Function):
    """Runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


class Device:
    """An objective on a device with room for so many tokens, and what it was asked for."""

    def __init__(self, objective: Objective, most: int, where: str = "forward") -> None:
        self.objective, self.most, self.where = objective, most, where
        self.asked: list[int] = []

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.asked.append(len(batch.tokens))
        loss, metrics = self.objective(batch)
        if len(batch.tokens) > self.most:
            if self.where == "backward":
                return _Fails.apply(loss), metrics  # pyright: ignore[reportReturnType]
            if self.where == "allocator":
                torch.empty(1 << 60, dtype=torch.uint8)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss, metrics


def open_learner(table: Table) -> Learner:
    parameters = dict(table.named_parameters())
    return Learner(
        parameters,
        adamw(parameters, 0.01, (0.9, 0.999), 1e-8, 0.0, "adamw8bit"),
        lambda step: 0.01,
        1.0,
        Mesh(torch.device("cpu")),
    )


def preferences(seed: int = 0) -> PreferenceBatch:
    generator = torch.Generator().manual_seed(seed)

    def answer(prompt: list[int], number: int) -> Sequence:
        own = torch.randint(3, VOCABULARY, (2 + number,), generator=generator).tolist()
        return Sequence((*prompt, *own), (0.0,) * len(prompt) + (1.0,) * len(own), number)

    prompts = [torch.randint(3, VOCABULARY, (4 + k,), generator=generator).tolist() for k in range(4)]
    pairs = ((0, 1, 0.0), (0, 2, 0.5), (1, 2, 0.0))
    return collate_comparisons([Comparison(tuple(answer(prompt, k) for k in range(3)), pairs) for prompt in prompts])


def rollouts(seed: int = 0) -> RolloutBatch:
    base, generator = preferences(seed), torch.Generator().manual_seed(seed)
    scored = base.weights != 0
    drawn = [torch.randn(len(scored), generator=generator) * scored for _ in range(6)]
    names = ("old_log_probs", "reference_log_probs", "old_values", "advantages", "returns", "value_weights")
    return RolloutBatch(
        **{field.name: getattr(base, field.name) for field in dataclasses.fields(Batch)},
        scores=torch.randn(base.num_sequences, generator=generator),
        groups=torch.arange(base.num_sequences) // 3,
        ended=torch.ones(base.num_sequences, dtype=torch.bool),
        **dict(zip(names, drawn, strict=True)),
    )


KINDS: dict[str, tuple[Callable[[Table], Objective], list[Any], Callable[[Any], float]]] = {
    "sequences": (
        lambda table: table.likelihood,
        [tiny_batch([9, 4, 7, 12, 3], VOCABULARY), tiny_batch([8, 8, 5], VOCABULARY, seed=1)],
        lambda batch: batch.total_weight,
    ),
    "pairs": (lambda table: table.ranking, [preferences(0), preferences(1)], lambda batch: batch.num_pairs),
    "rollouts": (lambda table: table.policy, [rollouts(0), rollouts(1)], lambda batch: batch.total_weight),
}


def trained(kind: str, most: int, limit: int | None, where: str = "forward") -> tuple[list[Any], Tensor, Device]:
    """Three steps on a device with room for so many tokens, from this limit on."""
    open_objective, batches, count = KINDS[kind]
    table = Table()
    learner, device = open_learner(table), Device(open_objective(table), most, where)
    learner.room.limit = limit
    torch.manual_seed(3)
    steps = [learner.step(batches, device, count) for _ in range(3)]
    return [*steps, learner.room.limit], table.logits.detach(), device


@pytest.mark.parametrize("where", ["forward", "backward", "allocator"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_ran_out_of_memory_equals_one_that_began_with_smaller_micro_batches(kind: str, where: str):
    largest = max(len(batch.tokens) for batch in KINDS[kind][1])
    expected, weights, smaller = trained(kind, 1000, largest // 2)
    found, ours, device = trained(kind, largest - 1, None, where)
    assert found == expected
    assert torch.equal(ours, weights)
    assert device.asked[1:] == smaller.asked or device.asked[2:] == smaller.asked  # which of the two is the largest
    assert max(smaller.asked) < largest


def test_the_limit_is_halved_until_it_fits_and_kept():
    found, _, device = trained("sequences", 12, None)
    divided = [9, 4, 7, 12, 3, 8, 8, 5]
    assert device.asked == [35, *[9, 11, 15], *divided * 3]  # two attempts that failed; from then on none does
    assert found[-1] == 7  # half of what the largest part had then
    expected, weights, _ = trained("sequences", 1000, 7)
    again, ours, _ = trained("sequences", 12, None)
    assert again == expected
    assert torch.equal(ours, weights)


def test_a_failed_attempt_leaves_no_gradient_behind():
    """The second micro-batch fails when the gradients of the first are there."""
    table = Table()
    learner, batches = open_learner(table), KINDS["sequences"][1][::-1]
    device = Device(table.likelihood, len(batches[0].tokens))
    torch.manual_seed(3)
    found = learner.step(batches, device, lambda batch: batch.total_weight)
    assert device.asked[:2] == [len(batch.tokens) for batch in batches]
    other = Table()
    expected = open_learner(other)
    expected.room.limit = learner.room.limit
    torch.manual_seed(3)
    assert found == expected.step(batches, other.likelihood, lambda batch: batch.total_weight)
    assert torch.equal(table.logits, other.logits)


def test_nothing_of_a_failed_attempt_is_there_at_the_next_one():
    """Not what frames hold, nor what cycles do; whoever still holds the error holds no tensors."""
    table = Table()
    learner, alive, errors = open_learner(table), list[weakref.ref[Tensor]](), list[Exception]()

    def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert all(reference() is None for reference in alive)
        loss, metrics = table.likelihood(batch)
        activations = loss * torch.ones(1000)
        if len(batch.tokens) > 20:
            alive.append(weakref.ref(activations))
            cycle: list[Any] = [activations]
            cycle.append(cycle)
            errors.append(torch.OutOfMemoryError("CUDA out of memory"))
            raise errors[-1]
        return loss, metrics

    gc.disable()
    try:
        learner.step(KINDS["sequences"][1], objective, lambda batch: batch.total_weight)
    finally:
        gc.enable()
    assert len(alive) == len(errors) == 1


def test_room_is_made_first_and_the_step_taken_whole_once_more():
    table = Table()
    learner, batches = open_learner(table), KINDS["sequences"][1]
    device, told, calls = Device(table.likelihood, 20), list[Shortage](), [0]

    def relieve() -> str:
        calls[0] += 1
        assert table.logits.grad is None
        device.most = 100
        return "all is given back"

    learner.room.relieve, learner.room.told = relieve, told.append
    torch.manual_seed(3)
    found = learner.step(batches, device, lambda batch: batch.total_weight)
    assert device.asked == [35, 35, 21]
    assert (calls, told, learner.room.limit) == ([1], [Shortage(35, None, "all is given back")], None)
    other = Table()
    torch.manual_seed(3)
    assert found == open_learner(other).step(batches, other.likelihood, lambda batch: batch.total_weight)
    assert torch.equal(table.logits, other.logits)


@pytest.mark.parametrize("gives", [0, 1, 3])
def test_where_that_is_not_enough_batches_are_divided(gives: int):
    """When there is nothing left to give back."""
    table = Table()
    learner, told, waiting = open_learner(table), list[Shortage](), ["cups", "plates", "spoons"][:gives]
    given, device = list(waiting), Device(table.likelihood, 30)
    learner.room.relieve, learner.room.told = lambda: waiting.pop(0) if waiting else None, told.append
    learner.step(KINDS["sequences"][1], device, lambda batch: batch.total_weight)
    assert device.asked[: 2 + gives] == [35] * (1 + gives) + [9]
    assert told == [*(Shortage(35, None, made) for made in given), Shortage(35, 17)]


def test_what_may_come_back_is_asked_after_each_step_that_memory_sufficed_for():
    table, calls = Table(), list[int]()
    learner = open_learner(table)
    learner.room.recover = lambda: calls.append(learner.steps_taken)
    for most in (100, 20, 100):
        learner.step(KINDS["sequences"][1], Device(table.likelihood, most), lambda batch: batch.total_weight)
    assert calls == [1, 2, 3]
    with pytest.raises(NoRoom):
        learner.step(KINDS["sequences"][1], Device(table.likelihood, 2), lambda batch: batch.total_weight)
    assert calls == [1, 2, 3]


@pytest.mark.parametrize("kind", ["sequences", "pairs"])
def test_what_cannot_be_divided_ends_the_step_with_the_weights_as_they_were(kind: str):
    open_objective, batches, count = KINDS[kind]
    table = Table()
    before, learner = table.logits.detach().clone(), open_learner(table)
    with pytest.raises(
        NoRoom, match="one sequence, " if kind == "sequences" else "a comparison of 3 sequences, "
    ) as end:
        learner.step(batches, Device(open_objective(table), 5), count)
    smallest = within(batches[0], 1)
    assert (end.value.tokens, end.value.num_sequences) in [(len(b.tokens), b.num_sequences) for b in smallest]
    assert torch.equal(table.logits, before)
    assert table.logits.grad is None
    assert learner.steps_taken == 0


def test_other_errors_are_nobodys_business():
    table = Table()

    def broken(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    learner = open_learner(table)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        learner.step(KINDS["sequences"][1], broken, lambda batch: batch.total_weight)
    assert learner.room.limit is None


def test_one_of_several_ranks_does_not_try_again_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(torch.OutOfMemoryError):
        trained("sequences", 20, None)


def test_each_batch_is_worked_on_in_parts_where_it_must_be():
    batches, room = KINDS["sequences"][1], Room()
    asked: list[int] = []

    def work(batch: Batch) -> list[int]:
        asked.append(len(batch.tokens))
        if len(batch.tokens) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch.tokens.tolist()

    found = list(room.each(batches, work))
    assert [number for _, part in found for number in part] == [n for batch in batches for n in batch.tokens.tolist()]
    assert [part.tokens.tolist() for part, _ in found] == [result for _, result in found]
    assert asked == [35, 9, 11, 15, 8, 13]  # the second batch is divided before it is tried
    assert room.limit == 17
    with pytest.raises(NoRoom):
        list(Room().each(batches, lambda batch: torch.empty(1 << 60, dtype=torch.uint8)))
