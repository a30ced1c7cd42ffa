"""Who takes part in preference learning: policy, reference, reward, value, each a model as an adapter makes it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from burnish.model.decoder import Decoder, Scores
from burnish.types import Batch


@dataclass(frozen=True, slots=True)
class Role:
    """A model, the adapter that changes it (None: none), and the head that it answers with.

    Several roles share one model: that is how four of them fit where one did.
    """

    model: Decoder
    adapter: str | None
    head: str | None = None
    temperature: float = 1.0
    """Divides the logits: answers are scored by the distribution that they are drawn from."""

    def score(self, batch: Batch) -> Scores:
        """Log-probability of each scored target, and whether it came first."""
        return self.model.score(batch, self.adapter, self.temperature)

    def log_probs(self, batch: Batch) -> Float[Tensor, " T"]:
        """The log-probability of each scored target; 0 elsewhere."""
        return self.model.log_probs(batch, self.adapter, self.temperature)

    def values(self, batch: Batch) -> Float[Tensor, " T"]:
        """What the head reads at each position."""
        assert self.head is not None
        return self.model.values(batch, self.head, self.adapter)
