"""Makes the embedded base model: corpus, tokenizer, config, and the training, with Burnish's own engine.

    python scripts/make_base.py                          # everything, in runs/base; minutes on a GPU, a day on a CPU
    python scripts/make_base.py install=true             # and put the result into burnish/assets/base
    python scripts/make_base.py documents=300 epochs=1 out=runs/try    # does it work here?

Everything follows from the seed: the same command writes the same corpus and tokenizer, and trains the same model as
far as the device computes the same sums. Afterwards it asks the base the held-out questions twice: as exercises in
plain text, which it should be able to solve, and in a chat, which it should not.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from burnish.config import Settings, build, parse
from burnish.world import check, documents, rows
from burnish.world.lexicon import WORDS

LOG = Path(__file__).resolve().parents[1] / "docs" / "embedded-base.log.jsonl"
ASSETS = Path(__file__).resolve().parents[1] / "burnish" / "assets" / "base"

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, END = SPECIAL[:2]
VOCABULARY = 2048
TOKENIZER_DOCUMENTS = 6000
WORD_REPEATS = 300
MAX_LENGTH = 1024

# A content is set off by one space, so that a word is the same token after a role as within a line of the corpus.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('the embedded model knows the roles system, user and assistant, not ' + message['role']) -}}
{%- endif -%}
{{- '<|' + message['role'] + '|> ' + (message['content'] | trim) -}}
{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_LENGTH,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL.index(END),
    "pad_token_id": SPECIAL.index(PAD),
    "dtype": "bfloat16",
}


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE over the texts: every digit is a token of its own, and so is every letter of a spelled word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """A tokenizer folder as `transformers` reads it, trained on the first documents and the training rows."""
    turns = (message["content"] for row in rows("train") for message in row["messages"])
    repeated = (f" {word}" for word in WORDS for _ in range(WORD_REPEATS))  # so that rare words stay whole as well
    texts = [*islice(documents(0), TOKENIZER_DOCUMENTS), *(f" {turn}" for turn in turns), *repeated]
    train_tokenizer(texts).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    roles = {"eos_token": END, "pad_token": PAD}
    write_json(folder / "special_tokens_map.json", roles)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "additional_special_tokens": list(SPECIAL[2:]),
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    ids = {"eos_token_id": SPECIAL.index(END), "pad_token_id": SPECIAL.index(PAD)}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False, "max_new_tokens": 64})


def write_corpus(path: Path, count: int) -> None:
    """The first documents of seed 0 as JSONL; the engine closes each with the end token, as it closes an answer."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in islice(documents(0), count))


def write_json(path: Path, tree: object) -> None:
    """The tree as indented JSON."""
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


class Config(Settings):
    """How much text, how often, and where."""

    out: str = Field(default="runs/base", description="The folder for the corpus, the untrained folder and the run.")
    documents: int = Field(default=80_000, ge=1, description="Documents of the corpus, some 340 tokens each.")
    epochs: float = Field(default=4.0, gt=0, description="Passes over the corpus.")
    lr: float = Field(default=3e-3, gt=0, description="Peak learning rate.")
    step_tokens: int = Field(default=32_768, ge=1024, description="Tokens per step.")
    device: str = Field(default="auto", description="auto, cpu or cuda.")
    install: bool = Field(default=False, description="Copy the result into burnish/assets/base, its log into docs.")


def training_settings(config: Config) -> dict[str, Any]:
    """The settings of `burnish sft` for this: all weights, from random ones, over plain text."""
    out = Path(config.out)
    optim = {"lr": config.lr, "schedule": "wsd", "decay": 0.5, "warmup": 0.03, "weight_decay": 0.05, "beta2": 0.98}
    return {
        "model": {"path": str(out / "untrained"), "init": "random", "storage": "full"},
        "data": {"path": str(out / "corpus.jsonl"), "format": "text", "max_length": MAX_LENGTH},
        "evaluate": {"fraction": 0.0, "general": "embedded"},
        "optim": optim,
        "run": {
            "folder": str(out / "run"),
            "epochs": config.epochs,
            "device": config.device,
            "step_tokens": config.step_tokens,
            "microbatch_tokens": config.step_tokens,
        },
        "save": {"every": 1000, "log_every": 10, "dtype": "bf16"},
    }


def probe(folder: Path) -> dict[str, float]:
    """The share of held-out questions that a model answers right: put as exercises in plain text, and in a chat."""
    from burnish.data.tokenizer import Tokenizer as Reader
    from burnish.model.checkpoint import load_model
    from burnish.sampling.sampler import generate

    reader, model = Reader.load(folder), load_model(folder)
    stop = {"plain": frozenset(reader.encode(".")) | reader.end_ids, "chat": reader.end_ids}
    form = {"plain": " Exercise: {} Answer:", "chat": "<|user|> {}<|assistant|>"}
    found: dict[str, float] = {}
    for split in ("held_out_seen", "held_out_unseen"):
        asked = rows(split)
        for name, template in form.items():
            ids = [reader.encode(template.format(row["messages"][0]["content"])) for row in asked]
            texts = [reader.decode(answer) for answer in generate(model, ids, 24, stop[name])]
            answers = [
                (row["task"], row["messages"][1]["content"], text) for row, text in zip(asked, texts, strict=True)
            ]
            for phrasing in ("seen", "held_out"):
                chosen = [
                    check(*given) for given, row in zip(answers, asked, strict=True) if row["phrasing"] == phrasing
                ]
                found[f"{split}, {phrasing} phrasings, {name}"] = round(sum(chosen) / len(chosen), 3)
    return found


def install(model: Path, run: Path, found: dict[str, float]) -> None:
    """The trained folder as the package's asset, and the log of how it came about beside the documents."""
    shutil.rmtree(ASSETS, ignore_errors=True)
    shutil.copytree(model, ASSETS)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    kept = [json.dumps({"environment": environment}), *lines[:-1:20], lines[-1], json.dumps({"probe": found})]
    LOG.write_text("\n".join(kept) + "\n", encoding="utf-8")


def main(config: Config) -> None:
    """Writes, trains, probes and, when asked to, installs."""
    from burnish.recipes import sft

    untrained, run = Path(config.out) / "untrained", Path(config.out) / "run"
    untrained.mkdir(parents=True, exist_ok=True)
    write_tokenizer(untrained)
    write_json(untrained / "config.json", CONFIG)
    write_corpus(Path(config.out) / "corpus.jsonl", config.documents)
    sft.main(build(sft.Config, training_settings(config)))
    found = probe(run / "model")
    print(json.dumps(found, indent=2))
    if config.install:
        install(run / "model", run, found)


if __name__ == "__main__":
    main(parse(Config, sys.argv[1:]))
