"""The parts of a run that trains a reward model: its head, what of the model is trained, and what is saved."""

import json
from pathlib import Path

import torch
from torch import nn

from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.assemble import POLICY, REFERENCE, open_model, saved_dtype
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.rewards import REWARD, Normaliser, fingerprints
from burnish.engine.start import Start
from burnish.model.adapter_config import ABOUT_FILE
from burnish.model.adapter_files import save_adapter
from burnish.model.adapters import HEAD, adapter_names, adapter_parameters, linear_layers, remove_adapter
from burnish.model.checkpoint import base_fingerprint, save_model
from burnish.model.decoder import Decoder
from burnish.model.heads import add_head, head_parameters
from burnish.settings import TrainingSettings


def open_reward_model(start: Start, config: TrainingSettings, mesh: Mesh) -> tuple[Decoder, str | None]:
    """The decoder with a fresh scalar head called REWARD, and the name of the adapter that trains (None: full weights).

    The trunk is where `start` ends: an adapter begins as a copy of the one stored there.
    """

    def furnish(decoder: Decoder) -> None:
        generator = torch.Generator().manual_seed(config.run.seed)
        head = add_head(decoder, REWARD, decoder.config.hidden_size, generator)
        # Only differences of scores are learned: of the bias they know nothing, but rounding would move it.
        head.bias.requires_grad_(False)
        if REFERENCE in adapter_names(decoder):  # the policy is a copy of it, and nobody asks it
            remove_adapter(decoder, REFERENCE)
        # A model that scores has no use for the language model's head.
        if POLICY in (adapters := linear_layers(decoder)[HEAD].adapters):
            del adapters[POLICY]
        if not decoder.config.tied:
            decoder.lm_head.requires_grad_(False)

    return open_model(start, config.model, config.adapter, config.run, mesh, furnish, config.optim)


def reward_parameters(decoder: Decoder, adapter: str | None) -> dict[str, nn.Parameter]:
    """What training changes: the head, and the adapter's weights or all weights that a score depends on."""
    parameters = (
        adapter_parameters(decoder, adapter) | head_parameters(decoder, REWARD)
        if adapter
        else dict(decoder.named_parameters())
    )
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


def save_reward(
    learner: Learner,
    decoder: Decoder,
    start: Start,
    config: TrainingSettings,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    normaliser: Normaliser,
) -> None:
    """Write the reward model to the run's folder/model or, where an adapter was trained, to folder/adapter.

    Every rank calls it. A sharded model is gathered weight by weight into a fresh one on the main rank's host.
    """
    mesh, full, folder = learner.mesh, config.adapter.kind == "none", Path(config.run.folder)
    if mesh.world > 1:
        trained = mesh.gather(learner.parameters)
        if not mesh.is_main:
            return
        decoder, name = open_reward_model(start, config, Mesh(torch.device("cpu")))
        for key, parameter in reward_parameters(decoder, name).items():
            parameter.data.copy_(trained[key])
    about = {
        "kind": REWARD,
        "normaliser": normaliser._asdict(),
        "base_fingerprint": base_fingerprint(start.base) if config.model.init == "weights" else None,
        "storage": config.model.storage,
        "double_quant": config.model.double_quant,
        **fingerprints(tokenizer, template),
    }
    if full:
        save_model(decoder, folder / "model", start.base, dtype=saved_dtype(config), head=REWARD)
        (folder / "model" / ABOUT_FILE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        name, revision = config.model.path, config.model.revision
        save_adapter(decoder, POLICY, folder / "adapter", name, start.words, about, revision, head=REWARD)
    if config.model.template != "auto":  # who asks it must write in the form that it was trained on
        tokenizer.save(folder / ("model" if full else "adapter"), template.source)
