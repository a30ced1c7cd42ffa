"""The nouns that flow through Burnish. Importing this file does not import torch.

The legend of shape letters, the same in every file:

    T  packed tokens of a batch, sequences laid end to end      V  vocabulary
    S  sequences in a batch (or slots of the sampler)           D  model width
    K  scored positions, those whose weight is not zero         H  heads, G key-value heads, C channels of a head
    P  pairs                                                    O, I  a weight's outputs and inputs
    R  rank of an adapter                                       N  blocks of a quantised weight
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
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
    """Two answers to one prompt, the better one first."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


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

    def to(self, device: "torch.device | str") -> "Batch":
        """The same batch on another device."""
        names = ("tokens", "targets", "weights", "positions", "sequence", "starts", "scored")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)
