"""From settings to the parts of a run: the model with its adapter laid over the devices, and the learner."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh, shard
from burnish.engine.planner import Planner, amount_of, has_host
from burnish.engine.relief import Relief
from burnish.engine.roles import Role
from burnish.engine.start import Start
from burnish.engine.trained import check_base
from burnish.model.adapter_files import load_adapter, save_adapter
from burnish.model.adapters import (
    AdapterSpec,
    adapter_names,
    adapter_parameters,
    add_adapter,
    copy_adapter,
    set_dropout,
)
from burnish.model.checkpoint import base_fingerprint, init_model, load_model, save_model
from burnish.model.decoder import Decoder
from burnish.ops import runs_kernels
from burnish.optim.adamw import adamw
from burnish.optim.schedule import multiplier
from burnish.settings import AdapterSettings, ModelSettings, OptimSettings, RunSettings, TrainingSettings, memory_bytes

POLICY = "policy"
"""The name of the adapter in training."""
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.04}
"""What an optimizer holds for each trained number."""
REFERENCE = "reference"
"""The name of the frozen adapter that it started from, where it was not fresh."""


def activation_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that run.dtype stands for on a device."""
    if name in ("auto", "fp8"):
        name = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def open_model(
    start: Start,
    model: ModelSettings,
    adapter: AdapterSettings,
    run: RunSettings,
    mesh: Mesh,
    furnish: Callable[[Decoder], None] | None = None,
    optim: OptimSettings | None = None,
) -> tuple[Decoder, str | None]:
    """The decoder, ready to train on every rank, and the name of the adapter that trains (None: full weights).

    The adapter is fresh, or a copy of the one that `start` names, which stays beside it under the name REFERENCE.
    `furnish` adds what else the model is to carry, before it is laid over the devices; `optim` says how much
    memory its optimizer will want.
    """
    torch.manual_seed(run.seed)
    dtype = activation_dtype(run.dtype, mesh.device)
    if model.init == "random":
        decoder = init_model(start.base, run.seed, model.storage, mesh.device, dtype, model.double_quant)
    else:
        decoder = load_model(start.base, model.storage, mesh.device, dtype, model.double_quant)
    name = None if adapter.kind == "none" else POLICY
    if start.adapter is not None:
        check_base(start.adapter, start.base)
        load_adapter(decoder, start.adapter, REFERENCE)
        copy_adapter(decoder, REFERENCE, POLICY)
        set_dropout(decoder, REFERENCE, 0.0)  # it may have been trained with some; what it says now must not be noise
        set_dropout(decoder, POLICY, adapter.dropout)
    elif name is not None:
        spec = AdapterSpec(**adapter.model_dump())
        add_adapter(decoder, name, spec, torch.Generator().manual_seed(run.seed))
    if furnish is not None:
        furnish(decoder)
    lay_out(decoder, run, mesh, STATE_BYTES[optim.kind if optim else "adamw"])
    return decoder, name


def lay_out(decoder: Decoder, run: RunSettings, mesh: Mesh, states: float = 8.0) -> None:
    """Make a complete decoder ready to run: how its blocks run, its place on the ranks, random numbers.

    `states` are the bytes that the optimizer will hold for each trained number. Raises ValueError where `run` asks for
    what cannot be had.
    """
    decoder.checkpointing = run.memory != "auto"  # of blocks that are not run by hand an amount is taken for the least
    if run.compile == "on" or (run.compile == "auto" and mesh.device.type == "cuda"):
        decoder.compile_blocks()
    half = decoder.dtype in (torch.bfloat16, torch.float16)
    by_hand = mesh.world == 1 and ((half and runs_kernels(mesh.device)) or run.fp8)
    if by_hand and decoder.fuse_blocks(run.fp8):
        decoder.planner = Planner(decoder, run, states, mesh.device)
        # Their memory is not in the plan: where an amount was asked for, it must be kept to.
        if decoder.fused is not None and run.compile != "off" and run.memory == "auto" and mesh.device.type == "cuda":
            decoder.fused.use_graphs()
        wet = [name for name in adapter_names(decoder) if run.fp8 and not decoder.takes(name)]
        if wet:  # one side of a comparison in 8 bits and the other not would differ from the start
            raise ValueError(
                f"run.dtype=fp8 goes with LoRA without dropout: the adapter {wet[0]} is none; leave it out"
            )
    elif run.fp8:
        reason = f"{mesh.world} ranks" if mesh.world > 1 else f"the blocks of a {decoder.config.architecture}"
        raise ValueError(f"run.dtype=fp8: 8-bit matmuls are not there for {reason}: leave it out")
    if not decoder.takes(POLICY):  # no pass that trains asks the planner, if there is one
        _check_weights(decoder, run.memory)
        if memory_bytes(run.memory) is not None and has_host(mesh.device) and mesh.is_main:
            tqdm.write(f"run.memory={run.memory} {_UNPLANNED}", file=sys.stderr)
    shard(decoder, decoder.model.layers, mesh)
    torch.manual_seed(run.seed + mesh.rank)  # what is drawn from here on, dropout, differs from rank to rank


_UNPLANNED = (
    "is compared with the weights alone: for this model, adapter, run.dtype or number of ranks there is no plan, and "
    "each block keeps its input and is computed again, as with run.memory=least"
)


def _check_weights(decoder: Decoder, memory: str) -> None:
    """Raises ValueError where an amount of memory, of which nobody makes a plan, does not even hold the weights."""
    amount = memory_bytes(memory)
    # Those of the process, not of a mesh: a whole copy that is gathered only to be written needs no room of its own.
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    needed = sum(parameter.nbytes for parameter in decoder.parameters()) / ranks
    if amount is not None and needed > amount:
        each = f" of each of {ranks} ranks" if ranks > 1 else ""
        raise ValueError(
            f"run.memory={memory} is too little: the weights{each} alone take {amount_of(needed)}; write a larger "
            "amount, or run.memory=auto"
        )


def reference_role(decoder: Decoder) -> Role:
    """What a trained adapter is measured against: the adapter that it started from, or the base where it was fresh."""
    return Role(decoder, REFERENCE if REFERENCE in adapter_names(decoder) else None)


def trained_parameters(decoder: Decoder, adapter: str | None) -> dict[str, nn.Parameter]:
    """What training changes: the adapter's weights, or all weights when there is no adapter."""
    return adapter_parameters(decoder, adapter) if adapter else dict(decoder.named_parameters())


def save_trained(
    learner: Learner,
    decoder: Decoder,
    folder: Path,
    start: Start,
    settings: TrainingSettings,
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> None:
    """Write what was trained: the whole model to folder/model, or the adapter alone to folder/adapter (PEFT layout).

    Every rank calls it. A sharded model is gathered weight by weight into a fresh one on the main rank's host.
    """
    mesh, full, base = learner.mesh, settings.adapter.kind == "none", start.base
    if mesh.world > 1:
        trained = mesh.gather(learner.parameters)
        if not mesh.is_main:
            return
        here = Mesh(torch.device("cpu"))
        decoder, name = open_model(start, settings.model, settings.adapter, settings.run, here)
        with torch.no_grad():
            for key, parameter in trained_parameters(decoder, name).items():
                parameter.copy_(trained[key])
    if full:
        save_model(decoder, folder / "model", base, dtype=saved_dtype(settings))
    else:
        about = {
            "base_fingerprint": base_fingerprint(base) if settings.model.init == "weights" else None,
            "storage": settings.model.storage,
            "double_quant": settings.model.double_quant,
        }
        name, revision = settings.model.path, settings.model.revision
        save_adapter(decoder, POLICY, folder / "adapter", name, start.words, about=about, revision=revision)
    if settings.model.template != "auto":  # who serves it must ask in the form that it was trained on
        tokenizer.save(folder / ("model" if full else "adapter"), template.source)


def saved_dtype(settings: TrainingSettings) -> torch.dtype:
    """The dtype of a fully trained model's files: fp32 for weights that are bf16 would only double them."""
    in_32 = settings.save.dtype == "fp32" and settings.model.storage != "full16"
    return torch.float32 if in_32 else torch.bfloat16


def open_learner(
    decoder: Decoder,
    adapter: str | None,
    optim: OptimSettings,
    steps: int,
    mesh: Mesh,
    parameters: dict[str, nn.Parameter] | None = None,
    counted: bool = True,
    beside: Learner | None = None,
) -> Learner:
    """A learner over these parameters, else over the adapter's weights, or over all weights when there is no adapter.

    The decoder's plans and the learner know of each other from then on: where memory is short, room is made.
    Not `counted` are micro-batches of which run.step_tokens does not say how many a step has. The memory is one with
    that of the learner `beside` it.
    """
    chosen = trained_parameters(decoder, adapter) if parameters is None else parameters
    learner, by_hand = learner_of(chosen, optim, steps, mesh), decoder.takes(adapter)
    learner.updated = partial(decoder.prepare, adapter)
    planner = decoder.planner if isinstance(decoder.planner, Planner) else None
    if planner is not None:
        planner.clips = optim.clip > 0
        planner.optimizers, planner.counted = (*planner.optimizers, learner.optimizer), counted
        planner.begin()
    if decoder.fused is not None and by_hand and counted:
        learner.taking = decoder.fused.taking
    if mesh.world == 1:
        known = beside.room.relieve if beside is not None else None
        relief = known if isinstance(known, Relief) else Relief(mesh.device)
        relief.add(decoder, learner.optimizer, planner if by_hand else None)
        learner.room.relieve, learner.room.recover = relief, relief.recover
    return learner


def learner_of(parameters: dict[str, nn.Parameter], optim: OptimSettings, steps: int, mesh: Mesh) -> Learner:
    """A learner over these parameters, whose learning rate takes so many steps to run its course."""
    assert optim.lr is not None
    betas, seed = (optim.beta1, optim.beta2), torch.initial_seed()  # of this rank: see `lay_out`
    optimizer = adamw(parameters, optim.lr, betas, optim.eps, optim.weight_decay, optim.kind, seed)
    peak, shape, warmup, decay = optim.lr, optim.schedule, optim.warmup, optim.decay
    return Learner(
        parameters, optimizer, lambda step: peak * multiplier(step, steps, shape, warmup, decay), optim.clip, mesh
    )
