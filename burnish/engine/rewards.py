"""Reward models in folders: found, told from what writes text, and checked against the model they are to judge.

Imports no torch.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.model.adapter_config import CONFIG_FILE, check_kind, read_about, read_adapter_config
from burnish.model.families import find_model, read_config

REWARD = "reward"
"""The name of a reward adapter and of its head, in a model that several adapters share."""


class Normaliser(NamedTuple):
    """Mean and standard deviation of raw scores on the answers that they were measured on."""

    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, score: float) -> float:
        """The score in deviations from the mean."""
        return (score - self.mean) / self.deviation


@dataclass(frozen=True, slots=True)
class StoredReward:
    """A reward model in a folder: an adapter with a head on the base of another model, or a model of its own."""

    folder: Path
    is_adapter: bool


def find_reward(path: str) -> StoredReward:
    """The reward model that `reward.path` names: a run, one of its folders, a model folder or a hub id.

    Raises ValueError where there is none, naming what there is instead.
    """
    run = Path(path)
    for folder in (run / "adapter", run):
        if (folder / CONFIG_FILE).exists():
            return _found(path, StoredReward(folder, is_adapter=True))
    for folder in (run / "model", run):
        if (folder / "config.json").exists():
            return _found(path, StoredReward(folder, is_adapter=False))
    if (run / "config.yaml").exists():
        raise ValueError(f"reward.path={path} is a run that has not finished: finish it with save.resume=true")
    if run.exists():
        raise ValueError(f"reward.path={path} holds no reward model: name a run of `burnish reward`")
    try:
        return _found(path, StoredReward(find_model(path), is_adapter=False))
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", "reward.path")) from None


def _found(path: str, stored: StoredReward) -> StoredReward:
    try:
        if stored.is_adapter:
            check_kind(stored.folder, read_adapter_config(stored.folder), wants_head=True)
        else:
            read_config(stored.folder, scores=True)
    except ValueError as error:
        raise ValueError(f"reward.path={path}: {error}") from None
    kind = read_about(stored.folder).get("kind", REWARD)
    if kind != REWARD:
        raise ValueError(f"reward.path={path} is a {kind} model: name the run of `burnish reward`")
    return stored


def normaliser(folder: Path) -> Normaliser:
    """What the scores of a reward model are normalised by; nothing where its folder does not say.

    Raises ValueError for a file that is damaged.
    """
    stored = read_about(folder).get("normaliser")
    try:
        return Normaliser() if stored is None else Normaliser(float(stored["mean"]), float(stored["deviation"]))
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{folder / 'burnish.json'}: `normaliser` is damaged: train the reward model again") from None


def fingerprints(tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, str]:
    """What names the token ids that a conversation becomes: the tokenizer's file and the template's text."""
    vocabulary, source = (tokenizer.folder / "tokenizer.json").read_bytes(), (template.source or "").encode()
    return {
        "tokenizer_fingerprint": hashlib.sha256(vocabulary).hexdigest()[:16],
        "template_fingerprint": hashlib.sha256(source).hexdigest()[:16],
    }


def check_words(folder: Path, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Raises ValueError when a reward adapter was trained on other token ids than these two give."""
    about, here = read_about(folder), fingerprints(tokenizer, template)
    for key, value in here.items():
        if about.get(key) not in (None, value):
            kind = key.removesuffix("_fingerprint")
            what = "model.template" if kind == "template" else "tokenizer"
            raise ValueError(
                f"the reward adapter in {folder} was trained with another {kind} than the one of {tokenizer.folder}: "
                f"both must read the same token ids, so train it with the same {what}"
            )
