"""LoRA factors as the trunk multiplies with them: in the dtype of activations, side by side, s folded into B.

Ranks are padded with zeros to one multiple of 16 for the whole model, which is what matrix units take. The copies are
made anew when the factors have changed, so once a step.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from burnish.model.adapters import LoRA
from burnish.model.joint import Joint

_copy_all = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
_multiply_all = torch._foreach_mul  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class Pair(NamedTuple):
    """The factors of a joint layer."""

    A: Float[Tensor, "kR I"]
    """Of its k layers, one below the other."""
    B: Float[Tensor, "O R"]
    """Of its k layers, one below the other, times s."""
    Bs: tuple[Float[Tensor, "o R"], ...]
    """The same B, layer by layer."""


class Factors:
    """The working copies of one adapter's factors, for joint layers in the order of the model."""

    def __init__(self, joints: Sequence[Joint], name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.joints = list(joints)
        self.loras = [[_lora(layer.adapters, name) for layer in joint.layers] for joint in joints]
        present = [lora for loras in self.loras for lora in loras if lora is not None]
        self.rank = -(-max(lora.rank for lora in present) // 16) * 16
        self.parameters = [parameter for lora in present for parameter in (lora.A, lora.B)]
        self.scales = [lora.scale for lora in present]
        self._seen: list[tuple[int, int]] = []
        self._A: list[Tensor] = []
        self._B: list[Tensor] = []
        self.pairs = [self._allocate(joint, loras, dtype) for joint, loras in zip(joints, self.loras, strict=True)]

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether these are copies of the factors that the layers have now, in this dtype."""
        now = [_lora(layer.adapters, self.name) for joint in self.joints for layer in joint.layers]
        then = [lora for loras in self.loras for lora in loras]
        return dtype == self.dtype and all(one is other for one, other in zip(now, then, strict=True))

    def refresh(self) -> None:
        """Make the copies equal to the factors, where these have changed."""
        seen = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters]
        if seen == self._seen:
            return
        with torch.no_grad():
            _copy_all(self._A, list(self.parameters[0::2]))
            _copy_all(self._B, _multiply_all(list(self.parameters[1::2]), self.scales))
        self._seen = seen

    def _allocate(self, joint: Joint, loras: Sequence[LoRA | None], dtype: torch.dtype) -> Pair | None:
        if not any(loras):
            return None
        rank, device = self.rank, self.parameters[0].device
        A = torch.zeros(len(loras) * rank, joint.shape[1], dtype=dtype, device=device)
        B = torch.zeros(joint.shape[0], rank, dtype=dtype, device=device)
        Bs = B.split(joint.widths)
        for place, lora in enumerate(loras):
            if lora is not None:
                self._A.append(A[place * rank : place * rank + lora.rank])
                self._B.append(Bs[place][:, : lora.rank])
        return Pair(A, B, Bs)


def _lora(adapters: nn.ModuleDict, name: str) -> LoRA | None:
    return cast(LoRA, adapters[name]) if name in adapters else None
