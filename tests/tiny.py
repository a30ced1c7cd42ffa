"""Tiny models, tokenizers and batches: made in milliseconds, of the same kinds as the real ones."""

import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from burnish.types import Batch

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "The cat sat on the mat and looked at the dog.",
    "What is 3 plus 4? 3 plus 4 is 7.",
    "user assistant system tool: answer the question, write the word backwards.",
    "Once upon a time there was a small red house by the sea.",
)

Groups = Sequence[tuple[int, Sequence[int]]]
"""For each prompt: how many tokens are shared, and how many each sequence has of its own after those."""

TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""What every tiny model has unless the architecture or the caller says otherwise."""

TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def tiny_folder(path: Path, architecture: str = "LlamaForCausalLM", seed: int = 0, **overrides: Any) -> Path:
    """A folder with a random checkpoint written by transformers, and a tokenizer with a chat template."""
    import transformers

    path.mkdir(parents=True, exist_ok=True)
    model_class = getattr(transformers, architecture)
    settings = {**TINY_CONFIG, **_ARCHITECTURES.get(architecture, {}), **overrides}
    if architecture == "Gemma3ForConditionalGeneration":
        settings = {"text_config": settings, "vision_config": TINY_VISION, "mm_tokens_per_image": 4}
    model = model_class(model_class.config_class(**settings))
    randomize(model, seed)
    model.save_pretrained(path)
    tiny_tokenizer(path)
    return path


def tiny_data(path: Path, count: int = 60) -> Path:
    """A JSONL file of so many short instruction rows, no two alike."""
    rows = [{"instruction": f"say {i} plus {i * i}", "output": "ab " * (i % 7) + "end"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def instead(words: Sequence[str], *others: str) -> list[str]:
    """The words of a command line, with others in place of those that give the same settings."""
    given = {word.partition("=")[0] for word in others}
    return [*(word for word in words if word.partition("=")[0] not in given), *others]


def forkserver() -> ForkServerContext:
    """A server of processes that has loaded torch once: a clean process for a run takes milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["burnish.recipes.sft", "burnish.engine.run", "burnish.evaluate.judge"])
    return context


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter drawn anew, so large that a wrong rotation, norm, bias or mask shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.2 * noise + (1.0 if "norm" in name else 0.0))


def tiny_batch(lengths: tuple[int, ...] | list[int], vocab_size: int = 320, seed: int = 0) -> Batch:
    """Random sequences of these lengths, laid end to end; the first third of each is a prompt that is not scored."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    tokens = torch.randint(3, vocab_size, (total,), generator=generator)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.arange(total) - starts[sequence]
    lengths_T = torch.tensor(lengths)[sequence]
    last = positions == lengths_T - 1
    targets = torch.where(last, 0, tokens.roll(-1))
    weights = ((positions >= lengths_T // 3) & ~last).float()
    return Batch(
        tokens=tokens,
        targets=targets,
        weights=weights,
        positions=positions,
        sequence=sequence,
        starts=starts,
        scored=weights.nonzero()[:, 0],
        num_sequences=len(lengths),
        longest=max(lengths),
        total_weight=float(weights.sum()),
        rows=tuple(range(len(lengths))),
    )


def tiny_shared_batch(groups: Groups, seed: int = 0) -> tuple[Batch, Batch, torch.Tensor]:
    """A batch of whole sequences, the same with shared prompts, and where each position of the first is in the second.

    What is shared is not scored.
    """
    whole = tiny_batch([shared + own for shared, owns in groups for own in owns], seed=seed)
    prefixes: list[tuple[int, int]] = []
    source: list[int] = []
    for shared, owns in groups:
        start = max(source, default=-1) + 1
        for number, own in enumerate(owns):
            prefixes.append((start, shared) if number else (0, 0))
            fresh = max(source, default=-1) + 1
            source += [*range(start, start + shared)] if number else [*range(fresh, fresh := fresh + shared)]
            source += range(fresh, fresh + own)
    source_W = torch.tensor(source)
    kept = torch.tensor([place not in source[:at] for at, place in enumerate(source)])
    tokens = whole.tokens[kept][source_W]
    last = whole.positions.roll(-1) == 0
    shared_W = torch.tensor([shared for shared, owns in groups for _ in owns])[whole.sequence]
    weights = torch.where((whole.positions < shared_W) | last, 0.0, 1.0)
    targets = torch.where(last, 0, tokens.roll(-1))
    whole = _with_scored(whole, tokens=tokens, targets=targets, weights=weights)
    columns = ("tokens", "targets", "weights", "positions", "sequence")
    parts = {name: getattr(whole, name)[kept] for name in columns}
    starts = [0, *torch.bincount(parts["sequence"]).cumsum(0).tolist()]
    parts["starts"] = torch.tensor(starts, dtype=torch.int32)
    return whole, _with_scored(whole, **parts, prefixes=tuple(prefixes)), source_W


def _with_scored(batch: Batch, **columns: Any) -> Batch:
    weights = columns["weights"]
    return dataclasses.replace(batch, **columns, scored=weights.nonzero()[:, 0], total_weight=float(weights.sum()))


def tiny_tokenizer(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A folder with a byte-level BPE tokenizer of 300 tokens; `<|im_end|>` (id 2) ends a turn."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_tokenizer_json())
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    if chat_template is not None:
        (path / "chat_template.jinja").write_text(chat_template)
    return path


@functools.cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str(pretty=True)


_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {"head_dim": 16},
    "GemmaForCausalLM": {"head_dim": 16, "num_key_value_heads": 1},
    "Gemma2ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5},
    "Gemma3ForCausalLM": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Gemma3ForConditionalGeneration": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0]},
}
