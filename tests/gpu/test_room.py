"""A device that really has too little memory: the step is taken again in halves, and nothing of the first try stays."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config import build
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.room import NoRoom, Shortage
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.settings import TrainingSettings
from burnish.types import Batch
from tests.tiny import tiny_batch, tiny_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
LENGTHS = [128] * 512
LIMIT = 128 * 256


class Trial:
    """A learner of its own, what its step gave, and the most memory that the allocator held in it."""

    def __init__(
        self, folder: Path, batch: Batch, limit: int | None = None, cap: int = 0, relieved: bool = False
    ) -> None:
        """`limit` and `cap` (bytes) are those of a second step; the first, which plans, is the same for all of them."""
        tokens = len(batch.tokens)
        tree = {
            "model": {"storage": "bf16"},
            "run": {"compile": "off", "microbatch_tokens": tokens, "step_tokens": tokens},
        }
        settings, mesh = build(TrainingSettings, tree), Mesh(torch.device("cuda", 0))
        model, adapter = open_model(Start(folder), settings.model, settings.adapter, settings.run, mesh)
        self.learner: Learner = open_learner(model, adapter, settings.optim, 6, mesh)
        self.told: list[Shortage] = []
        self.learner.room.limit, self.learner.room.told = LIMIT, self.told.append
        if not relieved:
            self.learner.room.relieve = None

        def objective(part: Batch) -> Any:
            scores = model.score(part, adapter)
            return cross_entropy(scores.log_probs, part.weights, scores.correct)

        self.learner.step([batch], objective, lambda part: part.total_weight)
        self.learner.room.limit = limit
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if cap:
            torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.mem_get_info()[1])
        try:
            self.metrics = self.learner.step([batch], objective, lambda part: part.total_weight)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        self.reserved, self.left = torch.cuda.max_memory_reserved(), torch.cuda.memory_allocated()


def test_a_step_under_a_cap_is_taken_in_halves(tmp_path):
    folder, batch = tiny_folder(tmp_path, **SHAPE), tiny_batch(LENGTHS).to("cuda")
    Trial(folder, batch, LIMIT)  # what is loaded and kept for good
    whole, halves = Trial(folder, batch).reserved, Trial(folder, batch, LIMIT)
    small, metrics, left = halves.reserved, halves.metrics, halves.left
    del halves
    assert small < 0.8 * whole, "the cap has to lie between the two"
    trial = Trial(folder, batch, cap=(small + whole) // 2)
    assert trial.told == [Shortage(len(batch.tokens), LIMIT)]
    assert trial.reserved <= (small + whole) // 2
    assert trial.metrics["loss"] == metrics["loss"]
    assert trial.metrics["mean_token_accuracy"] == metrics["mean_token_accuracy"]
    assert trial.metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-3)  # attention adds up in any order
    assert trial.left <= left + 2**20


def test_a_plan_that_takes_too_much_is_made_smaller_first(tmp_path):
    """What fits is found before the batch is divided, and the result is that of the whole batch."""
    folder, batch = tiny_folder(tmp_path, **SHAPE), tiny_batch(LENGTHS).to("cuda")
    Trial(folder, batch)
    whole = Trial(folder, batch)
    reserved, metrics = whole.reserved, whole.metrics
    del whole
    trial = Trial(folder, batch, cap=int(0.8 * reserved), relieved=True)
    assert trial.told
    assert all(shortage.limit is None and "of each block" in shortage.made for shortage in trial.told)
    assert trial.reserved <= 0.8 * reserved
    assert trial.metrics["loss"] == metrics["loss"]
    assert trial.metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-3)


def test_one_sequence_that_is_too_much_ends_the_step(tmp_path):
    """With its weights as they were, and the memory free again."""
    folder = tiny_folder(tmp_path, **SHAPE, max_position_embeddings=2**16)
    batch = tiny_batch([2**16]).to("cuda")
    whole, before = Trial(folder, batch).reserved, torch.cuda.memory_allocated()
    with pytest.raises(NoRoom, match="one sequence, 65,536 tokens, is too much by itself"):
        Trial(folder, batch, cap=int(0.6 * whole))
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20
