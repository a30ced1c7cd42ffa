"""Passes replayed as CUDA graphs against the same passes launch by launch."""

from pathlib import Path

import pytest
import torch

from burnish.engine.assemble import open_learner, open_model
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.model.adapters import adapter_parameters
from burnish.model.decoder import Decoder
from burnish.model.graphed import Key, Recording
from burnish.model.shelf import keep_inputs
from burnish.settings import AdapterSettings, ModelSettings, OptimSettings, RunSettings
from burnish.types import Batch
from tests.tiny import Groups, tiny_batch, tiny_folder, tiny_shared_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}
RAGGED = ((300, 17, 1, 200, 5), (290, 300), (700,), (257, 256, 255), (600, 1, 1, 1, 1, 1, 1))
"""All are padded to 768 tokens in 8 sequences of at most 1024."""
SHARED: tuple[Groups, ...] = (
    ((200, (100, 150)), (50, (60, 40))),
    ((60, (150, 130, 110)), (100, (60, 90))),
    ((255, (200, 250)),),
    ((1, (350,)), (30, (40, 41, 42, 43))),
    ((200, (284, 284)),),  # 768 tokens as they are: the padding has keys alone
    ((256, (256, 256)),),  # needs no padding
)
"""All are padded to 768 tokens in 8 sequences, of at most 512 and with 1024 keys where those are copied."""


def opened(folder: Path, storage: str = "bf16", dtype: str = "auto") -> tuple[Decoder, str]:
    run = RunSettings(device="cuda", compile="off", dtype=dtype)
    settings = ModelSettings(path=str(folder), storage=storage)
    model, name = open_model(Start(folder), settings, AdapterSettings(kind="lora"), run, Mesh(torch.device("cuda")))
    assert name is not None
    for key, parameter in adapter_parameters(model, name).items():
        parameter.data.normal_(0, 0.05, generator=torch.Generator("cuda").manual_seed(len(key)))
    return model, name


def use_graphs(model: Decoder) -> dict[Key, Recording]:
    assert model.fused is not None
    model.fused.use_graphs()
    assert model.fused.graphs is not None
    return model.fused.graphs._recordings


def gradients(model: Decoder, batch: Batch, adapter: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    scores = model.score(batch, adapter)
    (scores.log_probs * batch.weights).sum().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"log_probs": scores.log_probs.detach().double(), **found}


def batches(lengths: tuple[tuple[int, ...], ...]) -> list[Batch]:
    return [tiny_batch(part, SHAPE["vocab_size"], seed).to("cuda") for seed, part in enumerate(lengths)]


def shared_batches() -> list[Batch]:
    return [tiny_shared_batch(groups, seed)[1].to("cuda") for seed, groups in enumerate(SHARED)]


@pytest.mark.parametrize("memory", ["keep", "least"])
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_errs_at_most_twice_as_much_as_launch_by_launch(tmp_path, architecture, storage, memory) -> None:
    model, adapter = opened(tiny_folder(tmp_path / "model", architecture, **SHAPE), storage)
    if memory == "least":
        model.plan, model.planner = keep_inputs(3), None
    given = [*batches(RAGGED), *batches(((256,) * 4, (64,) * 9)), *shared_batches()]
    launched = [gradients(model, batch, adapter) for batch in given]
    recordings = use_graphs(model)
    replayed = [gradients(model, batch, adapter) for batch in [*given, *given, *given]][len(given) :]
    in_place = torch.cuda.get_device_capability()[0] == 9
    assert [(key.tokens, key.sequences, key.longest, key.shared, key.keys, key.even) for key in recordings] == [
        (768, 8, 1024, False, 0, False),
        (1024, 4, 256, False, 0, True),
        (576, 9, 64, False, 0, True),
        (768, 8, 1024, True, 0, False) if in_place else (768, 8, 512, True, 1024, False),
    ]
    model.fused, model.dtype = None, torch.float32
    exact = [gradients(model, batch, adapter) for batch in given]
    for number, ours in enumerate(replayed):
        theirs, wanted = launched[number % len(given)], exact[number % len(given)]
        for name, value in wanted.items():
            error, plain = (ours[name] - value).norm(), (theirs[name] - value).norm()
            assert error <= 2 * plain + 1e-4 * value.norm(), (number, name, error.item(), plain.item())


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_8_bit_matmuls(tmp_path, storage) -> None:
    model, adapter = opened(tiny_folder(tmp_path / "model", **SHAPE), storage, "fp8")
    given = [*batches(RAGGED), *shared_batches()]
    launched = [gradients(model, batch, adapter) for batch in given]
    recordings = use_graphs(model)
    replayed = [gradients(model, batch, adapter) for batch in [*given, *given]][len(given) :]
    assert len(recordings) == 2
    for ours, theirs in zip(replayed, launched, strict=True):
        for name, value in theirs.items():
            assert (ours[name] - value).norm() < 0.1 * value.norm(), name


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_log_probs_are_the_same_to_the_last_bit_before_a_recording_and_with_it(tmp_path, dtype) -> None:
    model, adapter = opened(tiny_folder(tmp_path / "model", **SHAPE), "nf4", dtype)
    recordings = use_graphs(model)
    (ragged,) = batches(RAGGED[:1])
    for batch in (ragged, shared_batches()[0]):
        known = len(recordings)
        found = [gradients(model, batch, adapter)["log_probs"]]
        assert len(recordings) == known
        found += [gradients(model, batch, adapter)["log_probs"] for _ in range(2)]
        assert len(recordings) == known + 1
        with torch.no_grad():
            found += [model.log_probs(batch, adapter).double() for _ in range(2)]
        assert len(recordings) == known + 2
        how = ["launched", "as it was recorded", "replayed", "launched without gradients", "replayed without gradients"]
        apart = {name: (log_probs - found[0]).abs().max().item() for name, log_probs in zip(how, found, strict=True)}
        assert not any(apart.values()), apart


def test_forward_alone_and_in_between(tmp_path) -> None:
    model, adapter = opened(tiny_folder(tmp_path / "model", **SHAPE))
    first, second = batches(RAGGED[:2])

    def between() -> list[torch.Tensor]:
        """A pass with gradients, around one without and another one with."""
        model.zero_grad()
        outer = model.score(first, adapter).log_probs.sum()
        with torch.no_grad():
            alone = model.log_probs(second, adapter)
        inner = model.score(second, adapter).log_probs.sum()
        outer.backward()
        inner.backward()
        found = [outer.detach(), alone, inner.detach()]
        return found + [p.grad.clone() for p in adapter_parameters(model, adapter).values() if p.grad is not None]

    expected = between()
    recordings = use_graphs(model)
    found = [between() for _ in range(4)]
    assert sorted(key.plan is not None for key in recordings) == [False, True]
    for ours in found:
        for mine, theirs in zip(ours, expected, strict=True):
            assert (mine - theirs).norm() < 0.03 * theirs.norm()


def test_training_follows_the_curve_of_launches(tmp_path) -> None:
    folder, given, curves = tiny_folder(tmp_path / "model", **SHAPE), batches(RAGGED[:4]), []
    for graphs in (False, True):
        model, adapter = opened(folder, "nf4")
        learner = open_learner(model, adapter, OptimSettings(lr=1e-3), 10, Mesh(torch.device("cuda")))
        recordings = use_graphs(model) if graphs else {}

        def objective(batch, model=model, adapter=adapter):
            scores = model.score(batch, adapter)
            return cross_entropy(scores.log_probs, batch.weights, scores.correct)

        curve = []
        for step in range(10):
            parts = given[:2] if step % 2 == 0 else given[2:]
            metrics = learner.step(parts, objective, lambda batch: batch.total_weight)
            curve.append((metrics["loss"], metrics["grad_norm"]))
        curves.append(torch.tensor(curve))
        assert len(recordings) == graphs
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-2, atol=2e-2)
    assert curves[0][8, 0] < curves[0][0, 0] - 0.02


def test_released_memory_can_be_used_again(tmp_path) -> None:
    model, adapter = opened(tiny_folder(tmp_path / "model", **SHAPE))
    (batch,) = batches(RAGGED[:1])
    for _ in range(2):
        gradients(model, batch, adapter)
    use_graphs(model)
    for _ in range(2):
        expected = gradients(model, batch, adapter)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    assert model.fused is not None
    model.fused.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held
    for _ in range(3):
        found = gradients(model, batch, adapter)
    for name, value in expected.items():
        assert (found[name] - value).norm() < 0.02 * value.norm(), name
