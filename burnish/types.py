"""The nouns that flow through Burnish. Importing this file does not import torch.

The legend of shape letters, the same in every file:

    T  packed tokens of a batch, sequences laid end to end      V  vocabulary
    S  sequences in a batch (or slots of the sampler)           D  model width
    K  scored positions, those whose weight is not zero         H  heads, G key-value heads, C channels of a head
    P  pairs                                                    O, I  a weight's outputs and inputs
    R  rank of an adapter                                       N  blocks of a quantised weight
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    weight: float | None = None
    """How much its tokens count in the loss; None leaves that to `data.train_on`."""
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What else the chat template may want to see: `tool_calls`, `name`, `tool_call_id`, ..."""


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation to learn from."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Text to learn from as it stands, without a chat template: pieces in order, each trained on or not."""

    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation to be answered, and what a grader compares the answer with."""

    messages: tuple[Message, ...]
    answer: str | None = None
    task: str | None = None
    """The family of tasks it belongs to, where the data names one; results are reported by family."""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Preference:
    """Answers to one prompt, and which of them are better than which."""

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    ranks: tuple[int, ...]
    """The place of each answer, 0 for the best; equal places say nothing about each other."""
    margin: float = 0.0
    """By how much the better answer's reward should exceed the other's."""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer to a prompt, and whether it is wanted: what KTO learns from."""

    prompt: tuple[Message, ...]
    answer: tuple[Message, ...]
    wanted: bool
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids, and the weight that predicting each of them has in the loss."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    row: int
    """The row of the data file it came from, counted from 0, for messages about it."""

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.weights)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sequences that one step sees together: the answers to one prompt, prompt included in each."""

    sequences: tuple[Sequence, ...]
    pairs: tuple[tuple[int, int, float], ...] = ()
    """(better, worse, margin), by place in `sequences`; together they weigh as much as one pair."""
    labels: tuple[int, ...] = ()
    """For KTO, one for each sequence: 1 wanted, -1 unwanted, 0 for an answer to another prompt, which only the estimate
    of the KL divergence reads."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """An answer that the policy wrote, and what it was worth."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """What was written, the end token included where there is one."""
    answer: str
    ended: bool
    """Whether it ended by itself: with an end token or a stop string, not at the length limit."""
    group: int
    """Which prompt of the step it answers; the answers of a group are compared with each other."""
    score: float | None = None
    """What the reward source gave; None where it failed, and the sample counts for nothing."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences laid end to end. Position t reads tokens[t] and is scored on targets[t], the token after it."""

    tokens: "Int[Tensor, ' T']"
    targets: "Int[Tensor, ' T']"
    """The token that follows; 0 at the last position of a sequence, whose weight is 0."""
    weights: "Float[Tensor, ' T']"
    """The weight of predicting targets[t]: 0 on prompts and at the end of each sequence."""
    positions: "Int[Tensor, ' T']"
    """Place within the sequence: restarts at 0 in each."""
    sequence: "Int[Tensor, ' T']"
    """Which sequence of the batch a position belongs to, from 0."""
    starts: "Int[Tensor, ' S+1']"
    """Where each sequence starts (int32), and T at the end: the `cu_seqlens` of variable-length attention."""
    scored: "Int[Tensor, ' K']"
    """The positions whose weight is not 0, in order: the only ones the head is applied to."""
    num_sequences: int
    longest: int
    """Tokens in the longest sequence."""
    total_weight: float
    """The sum of weights, known on the host so that counting costs no device synchronisation."""
    rows: tuple[int, ...] = ()
    """The data row of each sequence, for messages."""
    prefixes: tuple[tuple[int, int], ...] = ()
    """(start, length) of the tokens that each sequence reads before its own: a prompt that stands in the batch once, as
    the beginning of another sequence. Length 0: the sequence is whole. Empty: all are. `positions` count them."""

    def to(self, device: "torch.device | str") -> Self:
        """The same batch on another device."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in columns.items() if hasattr(v, "to")}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class PreferenceBatch(Batch):
    """A batch of whole comparisons."""

    chosen: "Int[Tensor, ' P']" = field(kw_only=True)
    """The better sequence of each pair, by its number in the batch."""
    rejected: "Int[Tensor, ' P']" = field(kw_only=True)
    margins: "Float[Tensor, ' P']" = field(kw_only=True)
    pair_weights: "Float[Tensor, ' P']" = field(kw_only=True)
    """1 / the number of pairs of its comparison: each comparison weighs 1, however many answers it ranks."""
    labels: "Int[Tensor, ' S']" = field(kw_only=True)
    """`Comparison.labels`, 0 where there are none."""
    num_pairs: float = field(kw_only=True)
    """The sum of pair_weights: comparisons that have pairs."""
    num_labels: int = field(kw_only=True)
    """Sequences that are labelled wanted or unwanted."""
    reference_log_probs: "Float[Tensor, ' T'] | None" = field(default=None, kw_only=True)
    """Of the frozen reference, where a loss asks one; 0 where the weight is 0."""


@dataclass(frozen=True, slots=True)
class RolloutBatch(Batch):
    """A batch of rollouts, and what the update needs to know of them; at positions of weight 0 it is 0."""

    scores: "Float[Tensor, ' S']" = field(kw_only=True)
    """NaN where there is none."""
    groups: "Int[Tensor, ' S']" = field(kw_only=True)
    ended: "Bool[Tensor, ' S']" = field(kw_only=True)
    old_log_probs: "Float[Tensor, ' T']" = field(kw_only=True)
    """Of the policy that wrote the answers."""
    reference_log_probs: "Float[Tensor, ' T']" = field(kw_only=True)
    old_values: "Float[Tensor, ' T']" = field(kw_only=True)
    advantages: "Float[Tensor, ' T']" = field(kw_only=True)
    returns: "Float[Tensor, ' T']" = field(kw_only=True)
    value_weights: "Float[Tensor, ' T']" = field(kw_only=True)
    """The weight of a position in the value model's loss."""
