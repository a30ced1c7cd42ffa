"""A tiny world for reinforcement learning: a model that writes letters and ends by itself at times, and whole runs."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers

from burnish.config import build
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.rewards import fingerprints
from burnish.model.adapter_files import save_adapter
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import base_fingerprint, load_model
from burnish.model.heads import add_head
from tests.tiny import tiny_folder

LETTERS = "abcdefghi"
END = len(LETTERS)
"""The id of the token that ends an answer; letters have their places as ids."""
METHODS = ("ppo", "grpo", "rloo", "reinforce")
TIMES = ("seconds", "tokens_per_second", "memory_bytes")
PROMPTS = ("a", "b c", "d e f", "b", "g h i a", "c c", "e", "f a")
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% if message['role'] == 'assistant' %}. {% endif %}"
    "{% endfor %}"
)


def letters_folder(path: Path, architecture: str = "LlamaForCausalLM", seed: int = 0, **overrides: Any) -> Path:
    """A model folder whose tokens are letters, and `.`, which ends an answer; not so with eos_token_id=None."""
    shape = {"vocab_size": END + 1, "num_hidden_layers": 1, "eos_token_id": END, "pad_token_id": None}
    tiny_folder(path, architecture, seed, **{**shape, **overrides})
    words = Words(models.WordLevel({letter: i for i, letter in enumerate(LETTERS + ".")}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "." if "eos_token_id" not in overrides else None,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def prompts_file(path: Path, prompts: tuple[str, ...] = PROMPTS) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def letters_world(folder: Path) -> Path:
    """A folder with a model in `base` and its prompts."""
    letters_folder(folder / "base")
    prompts_file(folder / "prompts.jsonl")
    return folder


def policy_adapter(base: Path, folder: Path, **spec: Any) -> Path:
    """The folder of an adapter that fine-tuning might have left, far from doing nothing."""
    model = load_model(base, "bf16")
    add_adapter(model, "made", AdapterSpec(**{"rank": 2, "alpha": 4.0, **spec}))
    _shake(adapter_parameters(model, "made"), seed=1)
    about = {"base_fingerprint": base_fingerprint(base), "storage": "bf16"}
    save_adapter(model, "made", folder, str(base), base, about)
    return folder


def reward_adapter(base: Path, folder: Path, words: Path | None = None, mean: float = 0.3, **spec: Any) -> Path:
    """The folder of a reward model: an adapter with a head, and a normaliser that changes something."""
    model = load_model(base, "bf16")
    add_adapter(model, "made", AdapterSpec(**{"rank": 3, "alpha": 3.0, **spec}))
    _shake(adapter_parameters(model, "made"), seed=2)
    add_head(model, "made", model.config.hidden_size, torch.Generator().manual_seed(3))
    tokenizer = Tokenizer.load(words or base)
    about = {
        "kind": "reward",
        "normaliser": {"mean": mean, "deviation": 1.7},
        "base_fingerprint": base_fingerprint(base),
        **fingerprints(tokenizer, ChatTemplate.open("auto", tokenizer)),
    }
    save_adapter(model, "made", folder, str(base), base, about, head="made")
    return folder


def _shake(parameters: Mapping[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)


def settings(world: Path, run: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a small run over the letters, as a nested mapping; `more` goes over them, group by group."""
    found: dict[str, Any] = {
        "model": {"path": str(world / "base")},
        "adapter": {"rank": 2},
        "data": {"path": str(world / "prompts.jsonl"), "max_length": 24},
        "evaluate": {"fraction": 0},
        "rollout": {"prompts": 4, "samples": 3, "max_tokens": 6},
        "reward": {"function": f"{__file__}:vowels"},
        "optim": {"lr": 0.01, "schedule": "constant", "warmup": 0},
        "run": {"steps": 2, "folder": str(run), "device": "cpu", "microbatch_tokens": 64, "step_tokens": 64},
        "save": {"every": 0, "trackers": []},
    }
    if more.get("model", {}).get("storage") == "full" or "from" in more:
        del found["adapter"]
    if "from" in more:
        del found["model"]
    if {"path", "url", "function"} & more.get("reward", {}).keys():
        del found["reward"]
    for name, given in more.items():
        found[name] = {**found.get(name, {}), **given} if isinstance(given, Mapping) else given
    return found


def train(method: str, world: Path, folder: Path, /, **more: Any) -> Path:
    """A run in this process, as its recipe makes it; its folder."""
    torch.set_num_threads(1)
    recipe = importlib.import_module(f"burnish.recipes.{method}")
    recipe.main(build(recipe.Config, settings(world, folder, more)))
    return folder


def lines(run: Path) -> list[dict[str, float]]:
    """The run's metrics, without what two equal runs may differ in."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES and not k.endswith("_seconds")} for line in found]


def trained(run: Path) -> dict[str, torch.Tensor]:
    """What the run leaves: the policy's weights and, by the name value.*, the value model's."""
    found: dict[str, torch.Tensor] = {}
    for name, file in (
        ("policy", "adapter/adapter_model"),
        ("policy", "model/model"),
        ("value", "value/adapter_model"),
    ):
        if (path := run / f"{file}.safetensors").exists():
            found |= {f"{name}.{key}": tensor for key, tensor in load_file(path).items()}
    return found


def assert_close(ours: Path, expected: Path, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Both runs logged and left the same, up to rounding."""
    for line, wanted in zip(lines(ours), lines(expected), strict=True):
        assert line.keys() == wanted.keys()
        for name in line.keys() - {"tokens", "num_tokens"}:
            difference = abs(line[name] - wanted[name])
            assert difference <= atol + rtol * abs(wanted[name]), (line["step"], name, line[name], wanted[name])
    found, wanted_tensors = trained(ours), trained(expected)
    assert found.keys() == wanted_tensors.keys()
    for name, tensor in wanted_tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=3e-4, msg=lambda text, n=name: f"{n}: {text}")


def vowels(samples: list[dict[str, Any]]) -> list[float]:
    """A reward: vowels are worth something, the more the earlier they come, and so is an answer that repeats none."""
    worth: list[float] = []
    for sample in samples:
        letters = sample["answer"].split()
        early = sum((letter in "aei") / (1 + place) for place, letter in enumerate(letters))
        worth.append(early + 0.3 * (len(set(letters)) == len(letters)))
    return worth
