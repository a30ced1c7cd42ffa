"""Who takes part in reinforcement learning: policy, reference, value and reward, adapters on one base."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from burnish.engine.assemble import (
    REFERENCE,
    activation_dtype,
    lay_out,
    open_model,
    reference_role,
)
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.rewards import REWARD, normaliser
from burnish.engine.roles import Role
from burnish.engine.start import Start
from burnish.engine.trained import tell_storage
from burnish.model.adapter_files import load_adapter, save_adapter
from burnish.model.adapters import AdapterSpec, adapter_names, adapter_parameters, add_adapter, copy_adapter
from burnish.model.checkpoint import base_fingerprint, init_model, load_model
from burnish.model.decoder import Decoder
from burnish.model.heads import ScalarHead, add_head, head_parameters
from burnish.sampling.scoring import RewardSource, open_reward, shared_reward
from burnish.sampling.task import C, Task
from burnish.settings import AdapterSettings, ReinforcementSettings

VALUE = "value"
"""The name of the value model's adapter and of its head."""


@dataclass(frozen=True, slots=True)
class Cast:
    """The roles, and what the value model learns with."""

    policy: Role
    reference: Role
    reward: RewardSource
    value: Role | None
    value_parameters: dict[str, nn.Parameter]
    models: nn.Module
    """Every model that is in memory."""


def open_cast(task: Task[C], mesh: Mesh, with_value: bool = False) -> Cast:
    """The roles of a task, ready on every rank; dropout is off in all of them.

    With an adapter all roles share the policy's base. With full weights reference, value and a reward adapter share a
    second, frozen copy of it.
    """
    config, start = task.config, task.start
    reward_adapter = shared_reward(config.reward, start.base)
    furnish, full = _furnishing(task, reward_adapter, with_value), config.adapter.kind == "none"
    if reward_adapter is not None and mesh.is_main:
        place = (config.kl.storage, "kl.storage") if full else (config.model.storage, "model.storage")
        tell_storage(reward_adapter, start.base, *place)
    model, name = open_model(
        start, config.model, config.adapter, config.run, mesh, None if full else furnish, config.optim
    )
    frozen = _second_copy(start, config, mesh, furnish) if full else model
    models = nn.ModuleList([model, frozen] if full else [model]).eval()
    temperature = config.rollout.temperature
    return Cast(
        policy=Role(model, name, temperature=temperature),
        reference=replace(reference_role(frozen), temperature=temperature),
        reward=open_reward(
            config.reward,
            task.tokenizer,
            task.template,
            Role(frozen, REWARD, REWARD) if reward_adapter is not None else None,
            mesh,
            config.run.microbatch_tokens,
        ),
        value=Role(frozen, VALUE, VALUE) if with_value else None,
        value_parameters=adapter_parameters(frozen, VALUE) | head_parameters(frozen, VALUE) if with_value else {},
        models=models,
    )


def save_value(cast: Cast, folder: Path, task: Task[C], learner: Learner) -> None:
    """Write the value model as an adapter folder with its head. Every rank calls it; the main one writes."""
    assert cast.value is not None
    model, config, start = cast.value.model, task.config, task.start
    if learner.mesh.world > 1:
        trained = learner.mesh.gather(learner.parameters)
        if not learner.mesh.is_main:
            return
        here, furnish = Mesh(torch.device("cpu")), _furnishing(task, shared_reward(config.reward, start.base), True)
        if config.adapter.kind == "none":
            model = _second_copy(start, config, here, furnish)
        else:
            model, _ = open_model(start, config.model, config.adapter, config.run, here, furnish)
        for name, parameter in (adapter_parameters(model, VALUE) | head_parameters(model, VALUE)).items():
            parameter.data.copy_(trained[name])
    from_file = config.model.init == "weights"
    about = {"kind": "value", "base_fingerprint": base_fingerprint(start.base) if from_file else None}
    base, revision = config.model.path, config.model.revision
    save_adapter(model, VALUE, folder, base, start.words, about=about, revision=revision, head=VALUE)


def _furnishing(task: Task[C], reward_adapter: Path | None, with_value: bool) -> Callable[[Decoder], None]:
    """What gives a model the roles that it carries besides policy and reference."""

    def furnish(decoder: Decoder) -> None:
        if reward_adapter is not None:
            load_adapter(decoder, reward_adapter, REWARD, head=REWARD)
        if with_value:
            _add_value(decoder, reward_adapter, task.config)

    return furnish


def _add_value(decoder: Decoder, reward: Path | None, config: ReinforcementSettings) -> None:
    """The value model: where the reward model is, when that is an adapter of this base; else where the policy starts.

    A value predicts the normalised score, so the head takes the normaliser in; a fresh head gives 0 everywhere.
    """
    if reward is not None:
        copy_adapter(decoder, REWARD, VALUE)
    elif REFERENCE in adapter_names(decoder):
        copy_adapter(decoder, REFERENCE, VALUE)
    else:
        spec = AdapterSpec(**_value_adapter(config.adapter).model_dump())
        add_adapter(decoder, VALUE, spec, torch.Generator().manual_seed(config.run.seed + 1))
    head = add_head(decoder, VALUE, decoder.config.hidden_size, torch.Generator())
    head.weight.data.zero_()
    if reward is not None:
        mean, deviation = normaliser(reward)
        source = cast(ScalarHead, decoder.heads[REWARD])
        head.weight.data.copy_(source.weight.data / deviation)
        head.bias.data.copy_((source.bias.data - mean) / deviation)


def _value_adapter(adapter: AdapterSettings) -> AdapterSettings:
    """The value model's adapter has the policy's shape; beside full weights it is a LoRA."""
    return adapter.model_copy(update={"kind": "lora"}) if adapter.kind == "none" else adapter


def _second_copy(
    start: Start, config: ReinforcementSettings, mesh: Mesh, furnish: Callable[[Decoder], None]
) -> Decoder:
    """A frozen copy of the model with all its weights that training starts from, with what it is to carry."""
    how = (config.kl.storage, mesh.device, activation_dtype(config.run.dtype, mesh.device), config.model.double_quant)
    if config.model.init == "random":
        decoder = init_model(start.base, config.run.seed, *how)
    else:
        decoder = load_model(start.base, *how)
    furnish(decoder)
    lay_out(decoder, config.run, mesh)
    return decoder
