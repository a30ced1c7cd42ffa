"""Every family, against transformers: equal logits, whole, packed, cached and saved."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from burnish.model.checkpoint import load_model, save_model
from burnish.model.families import FAMILIES, read_json
from burnish.sampling.sampler import Sampler, Sampling
from burnish.sampling.writing import Asked
from tests.tiny import tiny_batch, tiny_folder

LENGTHS = (11, 4, 19, 7, 1)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "LlamaForCausalLM": [
        {},
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": YARN},
        {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2, "attention_factor": 1.5}},
        {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}},
    ],
    "MistralForCausalLM": [{"sliding_window": 6}, {"sliding_window": None, "head_dim": 16}],
    "Qwen2ForCausalLM": [
        {"tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ],
    "Qwen3ForCausalLM": [{}, {"attention_bias": True, "num_key_value_heads": 1, "rope_parameters": YARN}],
    "GemmaForCausalLM": [{}, {"head_dim": 24, "attention_bias": True}],
    "Gemma2ForCausalLM": [
        {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "num_key_value_heads": 4},
    ],
    "Gemma3ForCausalLM": [
        {},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ],
    "Gemma3ForConditionalGeneration": [{}],
    "Phi3ForCausalLM": [
        {},
        {"sliding_window": 6, "partial_rotary_factor": 0.5, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    ],
    "SmolLM3ForCausalLM": [{}, {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [0, 1]}],
    "Olmo2ForCausalLM": [{}, {"attention_bias": True, "num_key_value_heads": 4}],
}
CASES = [pytest.param(name, given, id=f"{name}-{i}") for name in FAMILIES for i, given in enumerate(VARIANTS[name])]


def transformers_logits(folder: Path, batch: Any) -> torch.Tensor:
    """Each sequence on its own through transformers, the results laid end to end."""
    name = read_json(folder)["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    starts = batch.starts.tolist()
    with torch.no_grad():
        parts = [model(batch.tokens[None, a:b]).logits[0] for a, b in itertools.pairwise(starts)]
    return torch.cat(parts)


@pytest.mark.parametrize(("architecture", "given"), CASES)
def test_every_family_equals_transformers(tmp_path: Path, architecture: str, given: dict[str, Any]) -> None:
    folder = tiny_folder(tmp_path / "model", architecture, **given)
    batch = tiny_batch(LENGTHS)
    expected = transformers_logits(folder, batch)
    model = load_model(folder, storage="fp32")
    with torch.no_grad():
        logits = model.logits(batch)
        assert expected.abs().max() > 0.5  # large enough to tell a right decoder from a wrong one
        torch.testing.assert_close(logits, expected, **TOLERANCE)

        # The head's own path: log-probabilities of the scored targets.
        scores = model.score(batch)
        expected_log_probs = expected.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0] * (batch.weights != 0)
        torch.testing.assert_close(scores.log_probs, expected_log_probs, **TOLERANCE)
        correct = (expected.argmax(-1) == batch.targets) & (batch.weights != 0)
        assert torch.equal(scores.correct, correct)

        check_cached(model, expected, batch)
        check_sampled(model, folder)

    save_model(model, tmp_path / "saved", folder, dtype=torch.float32, max_shard_bytes=20_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    torch.testing.assert_close(transformers_logits(tmp_path / "saved", batch), expected, **TOLERANCE)


def check_cached(model: Any, expected: torch.Tensor, batch: Any) -> None:
    """Prompts of different lengths, then token by token, must see what the whole sequences see."""
    lengths = [length for length in LENGTHS if length > 1]
    steps = min(lengths) - 1
    prompt_lengths = [length - steps for length in lengths]
    starts = batch.starts.tolist()
    prompts = tiny_batch(prompt_lengths)
    ends = [starts[s] + prompt_lengths[s] for s in range(len(lengths))]
    tokens = torch.cat([batch.tokens[starts[s] : ends[s]] for s in range(len(lengths))])
    prompts = type(prompts)(**{**{f: getattr(prompts, f) for f in prompts.__slots__}, "tokens": tokens})

    cache = model.new_cache(len(lengths), max(lengths))
    logits = model.prefill(prompts, cache)
    for step in range(steps):
        at = torch.tensor([end + step for end in ends])
        torch.testing.assert_close(logits, expected[at - 1], **TOLERANCE)
        logits = model.decode(batch.tokens[at], cache)
    torch.testing.assert_close(logits, expected[torch.tensor(ends) + steps - 1], **TOLERANCE)


def check_sampled(model: Any, folder: Path) -> None:
    """With slots filled anew while others go on, every token is the one that transformers finds most likely there."""
    generator = torch.Generator().manual_seed(1)
    limits = {9: 4, 2: 9, 14: 6, 1: 11, 5: 3, 7: 8}  # tokens of an answer, by those of its prompt
    prompts = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in limits]
    asked = [Asked(prompt, 0, limits[len(prompt)]) for prompt in prompts]
    written = Sampler(model, 2).answer(asked, Sampling(max(limits.values())), None)
    assert [len(answer.ids) for answer in written] == list(limits.values())
    wholes = [[*prompt, *answer.ids] for prompt, answer in zip(prompts, written, strict=True)]
    lengths = [len(whole) for whole in wholes]
    packed = replace(tiny_batch(lengths), tokens=torch.tensor(list(itertools.chain(*wholes))))
    for logits, prompt, whole in zip(transformers_logits(folder, packed).split(lengths), prompts, wholes, strict=True):
        seen, tokens = logits[len(prompt) - 1 : -1], torch.tensor(whole[len(prompt) :])
        torch.testing.assert_close(seen.gather(1, tokens[:, None])[:, 0], seen.amax(1), **TOLERANCE)


def test_every_family_has_variants() -> None:
    assert set(VARIANTS) == set(FAMILIES)
