"""What to tell when memory runs out: what holds it, and which settings would take less."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from burnish.engine.memory import in_use
from burnish.engine.mesh import Mesh
from burnish.engine.room import Halfway, NoRoom, Shortage
from burnish.model.decoder import Decoder
from burnish.settings import TrainingSettings


class Moment(NamedTuple):
    """When memory ran out."""

    step: int
    """Counted from 1."""
    stage: Literal["before", "in", "later", "after"] = "in"
    """Before any weight of this run, or of this step, was changed; in a later update of the step; after its updates."""


def told(step: int, shortage: Shortage, longest: int) -> str:
    """A line about work at a step, counted from 1, that is done again; a micro-batch must hold `longest` tokens."""
    limit, work = shortage.limit, shortage.work
    begin = f"{work} at step {step} ran out of memory" if work else f"step {step} ran out of memory"
    if limit is None:
        return f"{begin}: {shortage.made}, and it is {'tried' if work else 'taken'} again"
    begin += f" with {shortage.tokens:,} tokens in a micro-batch"
    if work:
        return f"{begin}: it goes on with at most {limit:,}"
    advice = f"; run.microbatch_tokens={limit} begins with about that" if limit >= longest else ""
    return f"{begin}: it is taken again, and from now on one holds at most {limit:,}{advice}"


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
    error: BaseException, moment: Moment, config: TrainingSettings, mesh: Mesh, held: Mapping[str, int]
) -> str:
    """What ended the run, in one line: what holds the memory, and what to write instead."""
    longest, budget = config.data.max_length, config.run.microbatch_tokens
    settings = needing_less(config, mesh.world, longest)
    begin = _AT[moment.stage].format(moment.step)
    if isinstance(error, NoRoom):
        settings = needing_less(config, mesh.world, error.tokens if error.num_sequences == 1 else longest)
        if error.whole:
            size = max(error.tokens // 2, longest)
            settings.insert(0, f"run.step_tokens={size} run.microbatch_tokens={size}" if size < budget else _SHORTER)
        begin += f": {error.what} does not fit"
        begin += ", and no weight was changed by that step" if moment.stage == "in" else ""
    elif isinstance(error, Halfway):
        begin += ", when some weights had been changed already: it cannot be taken again"
    else:
        settings.insert(0, f"run.microbatch_tokens={max(budget // 2, longest)}" if budget > longest else _LESS)
        begin += f" with {_gib(in_use(mesh.device))} in use on {mesh.device}"
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
_SHORTER = "a smaller data.max_length with run.microbatch_tokens and run.step_tokens"
_AT = {
    "before": "out of memory before step {}",
    "in": "out of memory at step {}",
    "later": "out of memory at step {}, of which earlier updates have changed weights",
    "after": "out of memory after the updates of step {}",
}
