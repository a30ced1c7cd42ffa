"""A reward model learns a known score from noisy preferences as well as anybody can, and the mirrored labels mirror it.

Answers are eight words with a known score each, and which of two is preferred is drawn by Bradley and Terry's rule. So
what the best possible judge gets right, E[σ(|difference|)], is a sum over 28 pairs, and so is what a model gets right.
"""

import json
import math
import random
from itertools import combinations
from pathlib import Path

import pytest
import torch

from burnish.cli import main
from burnish.data.chat import encode_row
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.roles import Role
from burnish.model.adapter_files import load_adapter
from burnish.model.checkpoint import load_model
from burnish.sampling.reward_model import last_values
from burnish.types import Example, Message
from tests.tiny import tiny_folder

WORDS = ("cat", "house", "dog", "small", "mat", "time", "sea", "red")
GOLD = {word: 0.6 * (place - 3.5) for place, word in enumerate(WORDS)}
PAIRS = list(combinations(WORDS, 2))


def probability(better: str, worse: str) -> float:
    return 1 / (1 + math.exp(GOLD[worse] - GOLD[better]))


def rows(count: int, mirrored: bool) -> str:
    draw = random.Random(0)
    found: list[str] = []
    for number in range(count):
        pair = draw.sample(WORDS, 2)
        if (draw.random() < probability(*pair)) == mirrored:
            pair.reverse()
        found.append(json.dumps({"prompt": f"say {number}", "chosen": pair[0], "rejected": pair[1]}) + "\n")
    return "".join(found)


def trained(folder: Path, mirrored: bool) -> dict[str, float]:
    """What a reward model trained on the data says of each word, on average over prompts that are new to it."""
    tiny_folder(folder / "base", num_hidden_layers=1)
    (folder / "data.jsonl").write_text(rows(3000, mirrored))
    words = [f"model.path={folder / 'base'}", f"data.path={folder / 'data.jsonl'}", f"run.folder={folder / 'run'}"]
    words += ["data.max_length=64", "run.step_tokens=512", "run.microbatch_tokens=512"]
    words += ["optim.lr=0.005", "run.device=cpu", "save.every=0", "save.trackers=[]", "evaluate.fraction=0.04"]
    assert main(["reward", *words]) == 0
    model = load_model(folder / "base", "bf16").eval()
    load_adapter(model, folder / "run/adapter", "reward", head="reward")
    tokenizer = Tokenizer.load(folder / "base")
    template = ChatTemplate.open("auto", tokenizer)
    scores: dict[str, float] = {}
    for word in WORDS:
        chats = [(Message("user", f"say {k}{k}{k}{k}"), Message("assistant", word)) for k in range(1, 9)]
        ids = [encode_row(Example(chat), tokenizer, template, "last_assistant").ids[:-1] for chat in chats]
        scores[word] = sum(last_values(Role(model, "reward", "reward"), ids, 2048)) / len(ids)
    return scores


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[dict[str, float], dict[str, float]]]:
    """For data as it is and for mirrored data: the scores of the words, and the run's metrics."""
    found: dict[bool, tuple[dict[str, float], dict[str, float]]] = {}
    for mirrored in (False, True):
        folder = tmp_path_factory.mktemp(str(mirrored))
        scores = trained(folder, mirrored)
        found[mirrored] = scores, json.loads((folder / "run/after.json").read_text())["metrics"]
    return found


BAYES = sum(max(probability(a, b), probability(b, a)) for a, b in PAIRS) / len(PAIRS)


def accuracy(scores: dict[str, float]) -> float:
    """How often the scores are right about a pair whose better answer is drawn: exact, with no draw in it."""
    return sum(probability(a, b) if scores[a] > scores[b] else probability(b, a) for a, b in PAIRS) / len(PAIRS)


def test_it_reaches_what_the_best_judge_reaches(
    verdicts: dict[bool, tuple[dict[str, float], dict[str, float]]],
) -> None:
    scores, metrics = verdicts[False]
    assert pytest.approx(0.817, abs=0.001) == BAYES
    assert accuracy(scores) > BAYES - 0.01
    said, known = (torch.tensor([each[word] for word in WORDS]) for each in (scores, GOLD))
    assert torch.corrcoef(torch.stack([said, known]))[0, 1] > 0.97
    assert metrics["eval_accuracy"] == pytest.approx(BAYES, abs=3 * math.sqrt(BAYES * (1 - BAYES) / 120))


def test_mirrored_labels_mirror_it(verdicts: dict[bool, tuple[dict[str, float], dict[str, float]]]) -> None:
    scores, metrics = verdicts[True]
    assert accuracy(scores) < 1 - BAYES + 0.01
    said, known = (torch.tensor([each[word] for word in WORDS]) for each in (scores, GOLD))
    assert torch.corrcoef(torch.stack([said, known]))[0, 1] < -0.97
    assert metrics["eval_accuracy"] == pytest.approx(verdicts[False][1]["eval_accuracy"], abs=0.05)
