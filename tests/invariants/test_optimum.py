"""The recipes of reinforcement learning, run as a user runs them, reach the optimum that is known in closed form.

A model over 8 tokens writes answers of 2 tokens: 64 answers, so that everything is a finite sum. The maximum of
E[r] − β KL(π‖π_ref) is π* ∝ π_ref exp(r / β) (Ziegler et al. 2019, eq. 3).
"""

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from burnish.config import build
from burnish.data.packing import collate
from burnish.model.checkpoint import load_model
from burnish.types import Sequence
from tests.tiny import tiny_folder

LETTERS = "abcdefgh"
PROMPT = "a"

METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"minibatches": 1, "reward": {"missing_eos": "none"}, "value": {"lr": 1e-2}},
    "rloo": {},
    "grpo": {"scale": False, "kl": {"place": "reward", "estimator": "k1"}},
    "reinforce": {},
}


def score(samples: list[dict[str, Any]]) -> list[float]:
    """What an answer earns: a table that no simpler rule describes."""
    return [worth(sample["answer"]) for sample in samples]


def worth(answer: str) -> float:
    first, second = (LETTERS.index(letter) for letter in answer.split())
    return ((3 * first + 5 * second + first * second) % 11) / 10


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over 8 letters, which never ends an answer by itself, and its one prompt."""
    folder = tmp_path_factory.mktemp("optimum") / "base"
    shape = {"vocab_size": 8, "num_hidden_layers": 1, "eos_token_id": None, "pad_token_id": None}
    tiny_folder(folder, **shape)
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="h"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder.parent / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    return folder


def distribution(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """The probability of every answer under a model, exactly."""
    model = load_model(folder, "fp32", torch.device("cpu"), torch.float32)
    answers = list(itertools.product(range(8), repeat=2))
    batch = collate([Sequence((LETTERS.index(PROMPT), *answer), (0.0, 1.0, 1.0), 0) for answer in answers])
    with torch.no_grad():
        log_probs = model.log_probs(batch).double().view(64, 3).sum(1)
    return log_probs.exp(), [" ".join(LETTERS[i] for i in answer) for answer in answers]


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_reaches_the_known_optimum(method: str, beta: float, base: Path, tmp_path: Path) -> None:
    recipe = importlib.import_module(f"burnish.recipes.{method}")
    settings = {
        "model": {"path": str(base), "storage": "full"},
        "data": {"path": str(base.parent / "prompts.jsonl"), "max_length": 8},
        "evaluate": {"fraction": 0},
        "rollout": {"prompts": 1, "samples": 128, "max_tokens": 2, "slots": 128},
        "kl": {"beta": beta, "storage": "fp32"},
        "optim": {"lr": 1e-2, "schedule": "linear", "warmup": 0},
        "run": {"steps": 120, "folder": str(tmp_path / "run"), "device": "cpu"},
        "save": {"every": 0, "trackers": []},
    }
    for group, own in {"reward": {"function": f"{__file__}:score"}, **METHODS[method]}.items():
        settings[group] = {**settings.get(group, {}), **own} if isinstance(own, dict) else own
    settings["reward"] = {"function": f"{__file__}:score", **METHODS[method].get("reward", {})}
    recipe.main(build(recipe.Config, settings))

    reference, answers = distribution(base)
    optimum = torch.softmax(reference.log() + torch.tensor([worth(a) for a in answers]).double() / beta, 0)
    reached, _ = distribution(tmp_path / "run" / "model")
    assert (reference - optimum).abs().sum() / 2 > 0.05, "the optimum should not be where training starts"
    distance = float((reached - optimum).abs().sum() / 2)
    assert distance < 0.03, f"total variation {distance:.4f} after training"
