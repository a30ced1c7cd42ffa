"""Keys and values of sequences being written, one slot a sequence, so that a new token costs one position."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from burnish.model.families import DecoderConfig


class Cache:
    """Room for `max_tokens` positions in each of so many slots; slots may hold different lengths.

    A forward pass says first where its tokens go (`aim`, `aim_next`), then every block stores its keys and values there
    (`store`), and at last the tokens count as held (`fill`, `advance`). Its tensors stay where they are in memory for
    as long as it lives, and nothing that `decode` does with them waits for the device: CUDA graphs can hold it.
    """

    def __init__(
        self, config: DecoderConfig, num_slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (num_slots, config.num_kv_heads, max_tokens, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in config.layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in config.layers]
        self.lengths_S: Int[Tensor, " S"] = torch.zeros(num_slots, device=device, dtype=torch.long)
        """Tokens held in each slot."""
        self.max_tokens = max_tokens
        self.num_slots = num_slots
        """Slots in use, the first ones: the others cost nothing."""
        self.longest = 0
        """No slot whose tokens matter holds more; known on the host."""
        self.rounding = 1
        """A new token reads as many places as the longest slot holds, rounded up to a multiple of this."""
        self._windows = tuple({layer.window for layer in config.layers})
        self._slots_T, self._places_T = self.lengths_S, self.lengths_S
        self._seen: dict[int | None, Bool[Tensor, "S M"]] = {}

    @property
    def context(self) -> int:
        """How many places of each slot the next token will read, its own included."""
        return min(self.max_tokens, -(-(self.longest + 1) // self.rounding) * self.rounding)

    def aim(self, slots_T: Int[Tensor, " T"], places_T: Int[Tensor, " T"], longest: int) -> None:
        """The tokens of the coming pass go to these places of these slots, none of which will hold over `longest`."""
        self._check(longest)
        self._slots_T, self._places_T, self.longest = slots_T, places_T, max(longest, self.longest)

    def aim_next(self) -> Int[Tensor, " S"]:
        """The coming pass has one token per slot in use, which goes behind what the slot holds: its place there."""
        self._check(self.longest + 1)
        # A slot whose tokens no longer matter may hold more than is read: it goes on writing to the last place read, or
        # no place would be seen in a window and its NaN would be drawn as a token that there is not.
        places_S = self.lengths_S[: self.num_slots].clamp(max=self.context - 1)
        self._slots_T, self._places_T = torch.arange(self.num_slots, device=places_S.device), places_S
        back_SM = places_S[:, None] - torch.arange(self.context, device=places_S.device)
        self._seen = {
            window: (back_SM >= 0) & (back_SM < (self.max_tokens if window is None else window))
            for window in self._windows
        }
        return places_S

    def store(self, layer: int, k_TGC: Float[Tensor, "T G C"], v_TGC: Float[Tensor, "T G C"]) -> None:
        """Keep the keys and values of a layer where `aim` said."""
        self.keys[layer][self._slots_T, :, self._places_T] = k_TGC
        self.values[layer][self._slots_T, :, self._places_T] = v_TGC

    def held(
        self, layer: int, window: int | None
    ) -> tuple[Float[Tensor, "S G M C"], Float[Tensor, "S G M C"], Bool[Tensor, "S M"]]:
        """Keys and values of a layer in the slots in use, and which of them the new tokens see."""
        used = slice(0, self.num_slots), slice(None), slice(0, self.context)
        return self.keys[layer][used], self.values[layer][used], self._seen[window]

    def fill(self, slots_S: Int[Tensor, " s"], lengths_S: Int[Tensor, " s"]) -> None:
        """These slots now hold so many tokens."""
        self.lengths_S[slots_S] = lengths_S

    def advance(self) -> None:
        """Every slot in use now holds one token more."""
        self.lengths_S[: self.num_slots] += 1
        self.longest += 1

    def copy(self, sources: Int[Tensor, " s"], targets: Int[Tensor, " s"]) -> None:
        """What the source slots hold is now in the target slots too."""
        for part in (*self.keys, *self.values):
            held = part[:, :, : self.longest]
            held[targets] = held[sources]
        self.lengths_S[targets] = self.lengths_S[sources]

    def _check(self, longest: int) -> None:
        if longest > self.max_tokens:
            raise ValueError(
                f"the cache holds {self.max_tokens} tokens a slot and {longest} are wanted: make it larger"
            )
