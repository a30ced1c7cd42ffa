"""LoRA factors as the trunk multiplies with them: in the dtype of activations, side by side, s folded into B.

Ranks are padded with zeros to one multiple of 16 for the whole model, which is what matrix units take. The copies are
made anew when the factors have changed, so once a step.
"""

import math
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
    """Of its k parts, one below the other: where one layer gives them all, its A so many times."""
    B: Float[Tensor, "O R"]
    """Of its k parts, one below the other, times s."""
    Bs: tuple[Float[Tensor, "o R"], ...]
    """The same B, part by part."""


class Slots:
    """Where the layers of joint layers keep their adapters: found once, looked into before each pass."""

    def __init__(self, joints: Sequence[Joint]) -> None:
        self._by_name = [layer.adapters._modules for joint in joints for layer in joint.layers]  # pyright: ignore[reportPrivateUsage]

    def of(self, name: str | None) -> list[nn.Module | None]:
        """The adapter of that name in each layer; None where there is none."""
        return [by_name.get(name) for by_name in self._by_name] if name is not None else [None] * len(self._by_name)


class Factors:
    """The working copies of one adapter's factors, for joint layers in the order of the model."""

    def __init__(self, joints: Sequence[Joint], adapters: Sequence[nn.Module | None], name: str, dtype: torch.dtype):
        self.name, self.dtype, self.adapters = name, dtype, list(adapters)
        present = [cast(LoRA, adapter) for adapter in adapters if adapter is not None]
        self.rank = -(-max(lora.rank for lora in present) // 16) * 16
        self.parameters = [parameter for lora in present for parameter in (lora.A, lora.B)]
        self.scales = [lora.scale for lora in present]
        self.generation = 0
        """How often the copies were made anew."""
        self._seen: list[tuple[int, int]] = []
        self._A: list[Tensor] = []
        self._sources_A: list[Tensor] = []
        self._B: list[Tensor] = []
        # All copies of B in one tensor, so that one launch multiplies them with s.
        rows = sum(joint.shape[0] for joint in joints)
        self._all_B = torch.zeros(rows, self.rank, dtype=dtype, device=self.parameters[0].device)
        loras = iter(self.adapters)
        self.pairs = [
            self._pair(joint, B, [cast(LoRA | None, next(loras)) for _ in joint.layers])
            for joint, B in zip(joints, self._all_B.split([joint.shape[0] for joint in joints]), strict=True)
        ]

    def refresh(self) -> None:
        """Make the copies equal to the factors, where these have changed."""
        seen = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters]
        if seen == self._seen:
            return
        self.generation += 1
        B: list[Tensor] = [*self.parameters[1::2]]
        with torch.no_grad():
            if len(set(self.scales)) == 1 and math.frexp(self.scales[0])[0] == 0.5:  # a power of two rounds nothing
                _copy_all(self._A + self._B, self._sources_A + B)
                self._all_B.mul_(self.scales[0])
            else:
                _copy_all(self._A, self._sources_A)
                _copy_all(self._B, _multiply_all(B, self.scales))
        self._seen = seen

    def _pair(self, joint: Joint, B: Tensor, loras: Sequence[LoRA | None]) -> Pair | None:
        if not any(loras):
            return None
        A = torch.zeros(len(joint.parts) * self.rank, joint.shape[1], dtype=B.dtype, device=B.device)
        As = A.split(len(A) // len(loras))
        for lora, rows_A, rows_B in zip(loras, As, B.split(joint.widths), strict=True):
            if lora is not None:
                copies = [rows[: lora.rank] for rows in rows_A.split(self.rank)]
                self._A.extend(copies)
                self._sources_A.extend([lora.A] * len(copies))
                self._B.append(rows_B[:, : lora.rank])
        return Pair(A, B, B.split(joint.parts))
