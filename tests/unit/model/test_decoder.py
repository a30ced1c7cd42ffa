from pathlib import Path

import pytest
import torch

from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import init_model, load_model, weight_shapes
from burnish.model.decoder import Decoder
from burnish.ops import log_probs
from burnish.types import Batch
from tests.tiny import tiny_batch, tiny_folder

LENGTHS = (11, 4, 19, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "llama")


def gradients(model: Decoder, batch: Batch, adapter: str | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (model.log_probs(batch, adapter) * batch.weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_lora(model: Decoder, targets: str | tuple[str, ...] = "all-linear") -> None:
    add_adapter(model, "a", AdapterSpec(rank=2, targets=targets), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(model, "a").values():
        torch.nn.init.normal_(parameter, std=0.3)


def test_full_weights_are_all_trained_and_frozen_ones_are_not(folder: Path) -> None:
    assert all(p.requires_grad and p.dtype == torch.float32 for p in load_model(folder, "full").parameters())
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in load_model(folder, "full16").parameters())
    for storage in ("bf16", "fp32", "nf4"):
        assert not any(p.requires_grad for p in load_model(folder, storage).parameters())


@pytest.mark.parametrize("storage", ["full", "fp32"])
def test_recomputing_activations_changes_nothing(folder: Path, storage: str) -> None:
    model, batch = load_model(folder, storage), tiny_batch(LENGTHS)
    adapter = None
    if storage == "fp32":
        with_lora(model)
        adapter = "a"
    kept = gradients(model, batch, adapter)
    model.checkpointing = True
    recomputed = gradients(model, batch, adapter)
    assert kept.keys() == recomputed.keys()
    assert len(kept) > 10
    for name, gradient in kept.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, recomputed[name]), name


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_give_the_same(folder: Path) -> None:
    model, batches = load_model(folder, "full"), [tiny_batch(LENGTHS), tiny_batch((5, 6, 3)), tiny_batch((8, 8))]
    eager = [gradients(model, batch) for batch in batches]
    model.compile_blocks(backend="aot_eager")  # all of it but generating machine code, which takes a minute
    for batch, expected in zip(batches, eager, strict=True):
        for name, gradient in gradients(model, batch).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
    prompt = tiny_batch((3, 5))
    cache = model.new_cache(2, 6)
    model.prefill(prompt, cache)  # generation goes on working, uncompiled
    assert model.decode(torch.tensor([4, 5]), cache).shape == (2, 320)


def test_a_head_with_an_adapter_scores_by_its_own_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(log_probs.CHUNK_LOGITS, "cpu", 5 * 320)
    model, batch = load_model(folder, "fp32"), tiny_batch(LENGTHS)
    with_lora(model, ("lm_head",))
    assert "a" in model.lm_head.adapters
    logits = model.logits(batch, "a")
    expected = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0] * (batch.weights != 0)
    scores = model.score(batch, "a")
    torch.testing.assert_close(scores.log_probs, expected)
    assert torch.equal(scores.correct, (logits.argmax(-1) == batch.targets) & (batch.weights != 0))
    assert not torch.equal(logits, model.logits(batch))
    names = gradients(model, batch, "a")
    (expected * batch.weights).sum().backward()
    for name, parameter in model.named_parameters():
        if name in names:
            torch.testing.assert_close(parameter.grad, 2 * names[name])


def test_bf16_activations_stay_close_to_fp32(folder: Path) -> None:
    batch = tiny_batch(LENGTHS)
    exact = load_model(folder, "fp32").log_probs(batch)
    rounded = load_model(folder, "bf16", dtype=torch.bfloat16).log_probs(batch)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().mean() < 0.05


def test_a_batch_without_scored_positions_has_zero_log_probs_and_gradient(folder: Path) -> None:
    model = load_model(folder, "full")
    values = gradients(model, tiny_batch((1, 1)))
    assert all(not value.any() for value in values.values())


def test_slots_can_be_dropped_while_decoding(folder: Path) -> None:
    model, prompts = load_model(folder, "fp32"), tiny_batch((3, 6, 2))
    tokens = torch.tensor([10, 20, 30])
    whole, reduced = model.new_cache(3, 10), model.new_cache(3, 10)
    for cache in (whole, reduced):
        model.prefill(prompts, cache)
    expected = model.decode(tokens, whole)
    reduced.copy(torch.tensor([2]), torch.tensor([1]))
    reduced.num_slots = 2
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(model.decode(tokens[kept], reduced), expected[kept])
    assert reduced.lengths_S.tolist() == [4, 3, 2]


def test_a_slot_is_filled_anew_while_others_go_on(folder: Path) -> None:
    model, prompts, later = load_model(folder, "fp32"), tiny_batch((3, 6, 2)), tiny_batch((4, 5), seed=1)
    tokens, more = torch.tensor([10, 20, 30]), torch.tensor([11, 21, 31])
    mixed, first, second = (model.new_cache(n, 10) for n in (3, 3, 2))
    for cache in (mixed, first):
        model.prefill(prompts, cache)
        model.decode(tokens, cache)
    told = model.prefill(later, mixed, slots=torch.tensor([2, 0]))
    torch.testing.assert_close(told, model.prefill(later, second))
    assert mixed.lengths_S.tolist() == [5, 7, 4]
    logits = model.decode(more, mixed)
    torch.testing.assert_close(logits[1], model.decode(more, first)[1])
    torch.testing.assert_close(logits[[2, 0]], model.decode(more[[2, 0]], second))


def test_a_full_cache_says_so(folder: Path) -> None:
    model = load_model(folder, "fp32")
    cache = model.new_cache(1, 3)
    model.prefill(tiny_batch((3,)), cache)
    with pytest.raises(ValueError, match="the cache holds 3 tokens a slot and 4 are wanted"):
        model.decode(torch.tensor([1]), cache)


def test_a_fresh_model_is_drawn_from_its_config_and_seed(folder: Path) -> None:
    model, again, other = (init_model(folder, seed) for seed in (1, 1, 2))
    weights = dict(model.named_parameters())
    assert {name.replace(".stored.weight", ".weight"): tuple(p.shape) for name, p in weights.items()} == weight_shapes(
        model.config
    )
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, weights[name])
    matrix = weights["model.layers.0.mlp.up_proj.stored.weight"]
    assert not torch.equal(matrix, other.get_parameter("model.layers.0.mlp.up_proj.stored.weight"))
    assert matrix.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(weights["model.norm.weight"], torch.ones(32))
    loss = -model.log_probs(tiny_batch((40, 30))).sum() / tiny_batch((40, 30)).total_weight
    assert loss.item() == pytest.approx(torch.tensor(320.0).log().item(), rel=0.02)  # it knows nothing yet
    assert init_model(folder, 1, storage="nf4").model.layers[0].mlp.up_proj.stored.codes.dtype == torch.uint8


def test_an_embedding_on_the_host_is_read_from_there(tmp_path: Path) -> None:
    model = load_model(tiny_folder(tmp_path / "model", "LlamaForCausalLM"), "nf4")
    expected = model.hidden(tiny_batch([5, 3]))
    model.model.embed_tokens.to_host()
    assert torch.equal(model.hidden(tiny_batch([5, 3])), expected)
