"""What an answer earns is not what it is worth: a policy that optimises a flawed reward first gains of what is wanted,
then loses it, and the price of divergence decides how far it goes (Gao et al. 2023, arXiv 2210.10760).

A model over 10 letters writes answers of 3, so that what they are worth on average is a finite sum.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from burnish.data.packing import collate
from burnish.engine.roles import Role
from burnish.model.checkpoint import load_model
from burnish.sampling.practice import Practice
from burnish.types import Sequence
from tests.letters import LETTERS, letters_folder, prompts_file, train

SPICE = "c"
GOLD = (0.0, 0.6, 0.5, -1.0)
"""What people want, by how often the letter occurs: a little of it is welcome, nothing else is not."""
PROXY = (0.0, 0.6, 1.1, 1.5)
"""What training is told: the same at first, but the more the better."""
ANSWERS = torch.tensor(list(itertools.product(range(10), repeat=3)))
COUNTS = ANSWERS.eq(LETTERS.index(SPICE)).sum(1)
BETAS = (0.05, 0.3, 1.0)
METHODS: dict[str, dict[str, Any]] = {
    "rloo": {},
    "ppo": {"minibatches": 1, "value": {"lr": 0.02}},
}


def proxy(samples: list[dict[str, Any]]) -> list[float]:
    """The flawed reward."""
    return [PROXY[sample["answer"].count(SPICE)] for sample in samples]


class Mean(NamedTuple):
    """Over all answers, each with its probability."""

    gold: float
    proxy: float


def mean(chances: torch.Tensor) -> Mean:
    return Mean(*(float((chances * torch.tensor(table).double()[COUNTS]).sum()) for table in (GOLD, PROXY)))


@torch.no_grad()
def chances(role: Role) -> torch.Tensor:
    """The probability of every answer to the one prompt."""
    batch = collate([Sequence((0, *answer), (0.0, 1.0, 1.0, 1.0), 0) for answer in ANSWERS.tolist()])
    return role.log_probs(batch).double().view(-1, 4).sum(1).exp()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spice")
    letters_folder(folder / "base", eos_token_id=None)
    prompts_file(folder / "prompts.jsonl", ("a",))
    return folder


def curve(method: str, beta: float, world: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> list[Mean]:
    """What the policy's answers are worth and earn, exactly, after each step of a run."""
    found: list[Mean] = []
    metrics = Practice.metrics

    def watched(practice: Practice, *arguments: Any, **named: Any) -> dict[str, float]:
        found.append(mean(chances(practice.cast.policy)))
        return metrics(practice, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Practice, "metrics", watched)
        train(
            method,
            world,
            run,
            rollout={"prompts": 1, "samples": 48, "max_tokens": 3, "slots": 48},
            reward={"function": f"{__file__}:proxy"} | ({"missing_eos": "none"} if method == "ppo" else {}),
            kl={"beta": beta},
            optim={"lr": 0.005, "schedule": "linear"},
            run={"steps": 24, "microbatch_tokens": 512, "step_tokens": 512},
            **METHODS[method],
        )
    return found


@pytest.mark.parametrize("method", METHODS)
def test_what_is_wanted_rises_and_then_falls_unless_divergence_costs_more(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = chances(Role(load_model(world / "base", "bf16").eval(), None))
    start = mean(base)
    cheap, fair, dear = (curve(method, beta, world, tmp_path / str(beta), monkeypatch) for beta in BETAS)

    peak = max(range(len(cheap)), key=lambda step: cheap[step].gold)
    assert cheap[peak].gold > start.gold + 0.2
    assert cheap[-1].gold < start.gold - 0.5  # worse than if it had learnt nothing
    assert cheap[-1].proxy > cheap[peak].proxy + 0.3
    assert all(later.proxy > earlier.proxy - 0.02 for earlier, later in itertools.pairwise(cheap))
    assert 0 < peak < 20

    assert fair[-1].gold > start.gold + 0.15
    assert fair[-1].gold > dear[-1].gold > start.gold  # held so near that it gains little, too
    assert cheap[-1].proxy > fair[-1].proxy > dear[-1].proxy > start.proxy
    for beta, end in ((0.05, cheap[-1]), (0.3, fair[-1]), (1.0, dear[-1])):
        optimum = mean(torch.softmax(base.log() + torch.tensor(PROXY).double()[COUNTS] / beta, 0))
        assert end.proxy == pytest.approx(optimum.proxy, abs=0.12)
        assert end.gold == pytest.approx(optimum.gold, abs=0.25)
