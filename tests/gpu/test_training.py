"""Training on a CUDA device: the same numbers as on the CPU, compiled or not, and a run from end to end."""

import json

import pytest
import torch

from burnish.cli import main
from burnish.config import build
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.model.checkpoint import load_model
from burnish.settings import TrainingSettings
from tests.tiny import tiny_batch, tiny_data, tiny_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Inductor and Triton warn about their own insides.
    pytest.mark.filterwarnings("default"),
]
LENGTHS = [40, 7, 1, 128, 33, 90]
SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("LlamaForCausalLM", {}),
        ("MistralForCausalLM", {"sliding_window": 16, "num_key_value_heads": 8}),
        ("Qwen3ForCausalLM", {"head_dim": 32}),
        ("Gemma2ForCausalLM", {"head_dim": 32, "num_key_value_heads": 2}),  # soft-capped scores: the padded way
    ],
)
def test_bf16_logits_err_at_most_twice_as_much_as_the_same_maths_on_the_cpu(tmp_path, architecture, overrides):
    folder = tiny_folder(tmp_path, architecture, **{**SHAPE, **overrides})
    batch = tiny_batch(LENGTHS)
    exact = load_model(folder, "fp32", torch.device("cpu"), torch.float32).logits(batch).detach()
    plain = load_model(folder, "bf16", torch.device("cpu"), torch.bfloat16).logits(batch).detach()
    ours = load_model(folder, "bf16", torch.device("cuda"), torch.bfloat16).logits(batch.to("cuda")).detach().cpu()
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("storage", ["full", "bf16", "nf4"])
def test_compiled_equals_eager(tmp_path, storage, checkpointing):
    folder = tiny_folder(tmp_path, **SHAPE)
    curves = []
    for compile in ("off", "on"):
        torch.compiler.reset()
        tree = {
            "model": {"storage": storage},
            "run": {"compile": compile, "memory": "least" if checkpointing else "auto"},
        }
        settings = build(TrainingSettings, tree)
        mesh = Mesh(torch.device("cuda"))
        model, adapter = open_model(Start(folder), settings.model, settings.adapter, settings.run, mesh)
        learner = open_learner(model, adapter, settings.optim, 6, mesh)

        def objective(batch, model=model, adapter=adapter):
            scores = model.score(batch, adapter)
            return cross_entropy(scores.log_probs, batch.weights, scores.correct)

        batches = [tiny_batch([n + step for n in LENGTHS], seed=step).to("cuda") for step in range(6)]
        steps = [learner.step([batch], objective, lambda batch: batch.total_weight) for batch in batches]
        curves.append(torch.tensor([(metrics["loss"], metrics["grad_norm"]) for metrics in steps]))
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-2, atol=2e-2)


def test_a_qlora_run_from_end_to_end(tmp_path):
    folder = tiny_folder(tmp_path / "model", **SHAPE)
    tiny_data(tmp_path / "data.jsonl", 200)
    words = [f"model.path={folder}", f"data.path={tmp_path / 'data.jsonl'}", f"run.folder={tmp_path / 'run'}"]
    words += [
        "model.storage=nf4",
        "run.device=cuda",
        "run.steps=30",
        "run.step_tokens=512",
        "run.microbatch_tokens=256",
    ]
    words += ["data.max_length=128", "optim.lr=0.005", "evaluate.prompts=4", "save.trackers=[]"]
    assert main(["sft", *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert row["peak_memory_bytes"] > 0
