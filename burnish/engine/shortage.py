"""What to tell when memory runs out: what holds it, and which settings would take less."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from burnish.engine.memory import in_use
from burnish.engine.mesh import Mesh
from burnish.engine.room import Halfway, NoRoom, Shortage
from burnish.model.decoder import Decoder
from burnish.settings import TrainingSettings


def told(step: int, shortage: Shortage) -> str:
    """A line about a step, counted from 1, that is taken again."""
    if shortage.limit is None:
        return f"step {step} ran out of memory: {shortage.made}, and it is taken again"
    return (
        f"step {step} ran out of memory with {shortage.tokens:,} tokens in a micro-batch: it is taken again, and from "
        f"now on one holds at most {shortage.limit:,}; run.microbatch_tokens={shortage.limit} begins so"
    )


def told_taking(clips: bool) -> str:
    """A line about steps whose gradients are taken as they appear."""
    line = "memory: each weight of the blocks is updated as soon as its gradient is there"
    if clips:
        return f"{line}; for the norm of all gradients each step is computed twice (optim.clip=0 needs none)"
    return f"{line}; where one turns out not to be finite, others have changed by then"


def holdings(model: nn.Module, trained: Mapping[str, nn.Parameter], states: int) -> dict[str, int]:
    """The bytes that wait on this rank from step to step, by what they are; `states` are those of the optimizer."""
    ids = {id(parameter) for parameter in trained.values()}
    others = [part for part in (*model.parameters(), *model.buffers()) if id(part) not in ids]
    kind = "adapters" if any(".adapters." in name for name in trained) else "weights"
    found = {"weights": _bytes(others), "adapters": 0}
    found[kind] += _bytes(trained.values())
    found |= {"gradients": _bytes(trained.values()), "optimizer states": states}
    if isinstance(model, Decoder) and model.fused is not None and model.fused.taking.wanted:
        layers = [_bytes(weights) for weights in model.fused.trained_matrices()]
        found["gradients"] -= sum(layers) - max(layers)  # one layer's at a time
    return {name: size for name, size in found.items() if size}


def needing_less(config: TrainingSettings, world: int, longest: int) -> list[str]:
    """The settings that would take less memory than those of the run, and are not among them."""
    storage, full = config.model.storage, config.adapter.kind == "none"
    shorter = f"a data.max_length below {longest}" + (", with rollout.max_tokens" if hasattr(config, "rollout") else "")
    candidates = {
        "run.memory=least": config.run.memory != "least",
        shorter: True,
        "model.storage=nf4": storage in ("bf16", "fp32"),
        "model.storage=full16": storage == "full",
        "optim.kind=adamw8bit": config.optim.kind == "adamw" and world == 1,
        "adapter.kind=lora model.storage=nf4 in place of all weights": full,
    }
    return [setting for setting, helps in candidates.items() if helps]


def out_of_memory(
    error: BaseException, step: int, config: TrainingSettings, mesh: Mesh, held: Mapping[str, int]
) -> str:
    """What ended the run at a step, counted from 1, in one line: what holds the memory, and what to write instead."""
    longest, budget = config.data.max_length, config.run.microbatch_tokens
    settings = needing_less(config, mesh.world, longest)
    if isinstance(error, NoRoom):
        settings = needing_less(config, mesh.world, error.tokens if error.num_sequences == 1 else longest)
        begin = f"out of memory at step {step}: {error.what} does not fit, and no weight was changed by that step"
    elif isinstance(error, Halfway):
        begin = f"out of memory at step {step}, when some weights had been changed already: it cannot be taken again"
    else:
        settings.insert(0, f"run.microbatch_tokens={max(budget // 2, longest)}" if budget > longest else _LESS)
        begin = f"out of memory at step {step} with {_gib(in_use(mesh.device))} in use on {mesh.device}"
    if mesh.world > 1:
        begin += "; on several ranks no step is tried again with smaller micro-batches"
    table = ", ".join(f"{name} {_gib(size)}" for name, size in held.items())
    return (
        f"{begin}. What stays from step to step: {table}. Any of these needs less: {', '.join(settings)}; with other "
        "settings it starts anew, with another run.folder"
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of this rank's pieces."""
    return sum(cast(Any, t).to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


_LESS = "a smaller run.microbatch_tokens and data.max_length"
