"""Keys and values of sequences being written, one slot a sequence, so that a new token costs one position."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from burnish.model.families import DecoderConfig


class Cache:
    """Room for `max_tokens` positions in each of `num_slots` slots; slots may hold different lengths.

    A forward pass says first where its tokens go (`aim`), then every block stores its keys and values there (`store`),
    and at last the tokens count as held (`advance`).
    """

    def __init__(
        self, config: DecoderConfig, num_slots: int, max_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (num_slots, config.num_kv_heads, max_tokens, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in config.layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in config.layers]
        self.lengths_S: Int[Tensor, " S"] = torch.zeros(num_slots, device=device, dtype=torch.long)
        """Tokens held in each slot."""
        self.longest = 0
        """No slot holds more; known on the host."""
        self.max_tokens = max_tokens
        self._windows = tuple({layer.window for layer in config.layers})
        self._slots_T, self._places_T = self.lengths_S, self.lengths_S
        self._seen: dict[int | None, Bool[Tensor, "S M"]] = {}

    @property
    def num_slots(self) -> int:
        """How many sequences fit."""
        return self.lengths_S.shape[0]

    def aim(self, slots_T: Int[Tensor, " T"], places_T: Int[Tensor, " T"], longest: int) -> None:
        """The tokens of the coming pass go to these places of these slots; no slot will hold more than `longest`."""
        if longest > self.max_tokens:
            raise ValueError(
                f"the cache holds {self.max_tokens} tokens a slot and {longest} are wanted: make it larger"
            )
        self._slots_T, self._places_T, self.longest = slots_T, places_T, max(longest, self.longest)

    def aim_next(self) -> None:
        """The coming pass has one token per slot, which goes behind what the slot holds."""
        slots = torch.arange(self.num_slots, device=self.lengths_S.device)
        self.aim(slots, self.lengths_S, self.longest + 1)
        place_M = torch.arange(self.longest, device=self.lengths_S.device)
        back_SM = self.lengths_S[:, None] - place_M
        self._seen = {
            window: (back_SM >= 0) & (back_SM < (self.longest if window is None else window))
            for window in self._windows
        }

    def store(self, layer: int, k_TGC: Float[Tensor, "T G C"], v_TGC: Float[Tensor, "T G C"]) -> None:
        """Keep the keys and values of a layer where `aim` said."""
        self.keys[layer][self._slots_T, :, self._places_T] = k_TGC
        self.values[layer][self._slots_T, :, self._places_T] = v_TGC

    def held(
        self, layer: int, window: int | None
    ) -> tuple[Float[Tensor, "S G M C"], Float[Tensor, "S G M C"], Bool[Tensor, "S M"]]:
        """Keys and values of a layer as far as any slot is filled, and which of them the new token sees."""
        return self.keys[layer][:, :, : self.longest], self.values[layer][:, :, : self.longest], self._seen[window]

    def advance(self, lengths_S: Int[Tensor, " S"]) -> None:
        """The slots now hold so many tokens."""
        self.lengths_S = lengths_S

    def keep(self, slots: Int[Tensor, " S"]) -> None:
        """Only these slots, in this order: sequences that are finished cost nothing more."""
        self.keys = [k.index_select(0, slots) for k in self.keys]
        self.values = [v.index_select(0, slots) for v in self.values]
        self.lengths_S = self.lengths_S[slots]
