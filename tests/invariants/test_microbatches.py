"""However a step's sequences are cut into micro-batches, loss, gradient norm and weights are the same."""

import pytest
import torch

from burnish.config import build
from burnish.data.packing import collate
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.settings import TrainingSettings
from burnish.types import Sequence
from tests.tiny import tiny_folder

LENGTHS = (3, 40, 7, 2, 25, 11, 64, 5)
CUTS = {"8 x 1": [1] * 8, "4 x 2": [2] * 4, "1 x 8": [8], "ragged": [1, 5, 2]}
STEPS = 3


def sequences(step: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(step)
    found: list[Sequence] = []
    for row, length in enumerate(LENGTHS):
        ids = torch.randint(3, 320, (length,), generator=generator).tolist()
        weights = [0.0] + [1.0 if place % 3 else 0.5 for place in range(1, length)]
        found.append(Sequence(tuple(ids), tuple(weights), row))
    return found


def learned(folder, tree, cut: list[int]) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    settings = build(TrainingSettings, tree | {"run": {"compile": "off"}})
    mesh = Mesh(torch.device("cpu"))
    model, adapter = open_model(Start(folder), settings.model, settings.adapter, settings.run, mesh)
    learner = open_learner(model, adapter, settings.optim, STEPS, mesh)

    def objective(batch):
        scores = model.score(batch, adapter)
        return cross_entropy(scores.log_probs, batch.weights, scores.correct)

    curve: list[tuple[float, float]] = []
    for step in range(STEPS):
        pending = sequences(step)
        batches = []
        for size in cut:
            batches.append(collate(pending[:size]))
            pending = pending[size:]
        metrics = learner.step(batches, objective, lambda batch: batch.total_weight)
        curve.append((metrics["loss"], metrics["grad_norm"]))
    return curve, {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}


@pytest.mark.parametrize("tree", [{"model": {"storage": "full"}}, {"model": {"storage": "nf4"}}], ids=["full", "qlora"])
def test_micro_batches_do_not_change_a_step(tmp_path, tree):
    folder = tiny_folder(tmp_path)
    tree = tree | {"optim": {"lr": 1e-3, "schedule": "constant", "warmup": 0}}
    expected, weights = learned(folder, tree, CUTS["1 x 8"])
    for cut in CUTS.values():
        curve, found = learned(folder, tree, cut)
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=2e-5, atol=0)
        # Adam's first steps have the size of the rate whatever the gradient: where that is all but 0, so is its sign.
        differing = sum(((found[name] - weights[name]).abs() > 1e-5).sum() for name in weights)
        assert differing <= 1e-3 * sum(weight.numel() for weight in weights.values())
