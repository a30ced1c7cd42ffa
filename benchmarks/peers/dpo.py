"""DPO by TRL or Unsloth, as a worker of `benchmarks/turns.py`: a turn is so many warm-up steps and so many timed ones.

Random words, prompts and answers of fixed length, LoRA on all linear layers, no dropout; gradients are taken of every
answer token. Both are given what their own documents recommend for speed: bf16, 8-bit AdamW, SDPA; Unsloth its
patched trainer and its own checkpointing, TRL its chunked head. `--fused` adds what both offer besides: Liger's layer
kernels in TRL, a loss from hidden states in Unsloth.
"""

import argparse
import os
import random
import sys
import tempfile


def main(words: list[str]) -> None:
    """Trains for as many turns as will be asked for, waiting before each."""
    asked = read_arguments(words)
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"})
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # a cache shared with another worker would save it the work
    if asked.system == "unsloth":
        os.environ["UNSLOTH_FUSED_PREFERENCE_LOSS"] = str(asked.fused)
        import unsloth  # before what it patches
    import torch
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from benchmarks.meter import Meter, here
    from benchmarks.peers.gate import Gate, versions
    from benchmarks.peers.systems import open_system

    device = here()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    if asked.system == "unsloth":
        unsloth.PatchDPOTrainer()
    model, adapter = open_system(asked, device)
    gate = Gate(Meter(asked.warm_up, asked.timed, device))
    on_card = device.type == "cuda"
    extra = {"use_liger_kernel": bool(asked.fused)} if asked.system == "trl" else {}
    if asked.system == "trl" and asked.checkpointing:
        extra["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=asked.pairs,
        gradient_accumulation_steps=1,  # Unsloth's own default is 2
        max_steps=asked.turns * (asked.warm_up + asked.timed),
        bf16=True,
        use_cpu=not on_card,
        optim="adamw_8bit" if on_card else "adamw_torch",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        gradient_checkpointing=bool(asked.checkpointing),
        max_length=asked.prompt + asked.answer,
        beta=0.1,
        precompute_ref_log_probs=bool(asked.cached),
        dataset_num_proc=1,
        dataloader_num_workers=0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        seed=0,
        **extra,
    )
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=random_pairs(asked, len(tokenizer)),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[gate],
    )
    check_lengths(trainer, asked)
    gate.about = {
        "versions": versions(*(["unsloth", "unsloth_zoo"] if asked.system == "unsloth" else []), "trl", "bitsandbytes"),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "load_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_card else 0.0,
    }
    trainer.train()


def read_arguments(words: list[str]) -> argparse.Namespace:
    """What the worker is to do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", choices=("trl", "unsloth"), required=True)
    parser.add_argument("--model", required=True)
    for name, value in (("prompt", 512), ("answer", 512), ("pairs", 2), ("rank", 16), ("alpha", 32), ("turns", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("warm-up", 3), ("timed", 5), ("checkpointing", 1), ("cached", 0), ("fused", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args(words)
    asked.storage, asked.attention, asked.length = "nf4", "sdpa", asked.prompt + asked.answer
    return asked


def random_pairs(asked: argparse.Namespace, vocab_size: int):
    """Prompts and answers of random words; the trainer adds the end token, the last of an answer's tokens."""
    from datasets import Dataset

    from benchmarks.shapes import FIRST_ID

    draw = random.Random(0)
    count = asked.pairs * asked.turns * (asked.warm_up + asked.timed)

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(FIRST_ID, vocab_size)}" for _ in range(length))

    columns = {"prompt": asked.prompt, "chosen": asked.answer - 1, "rejected": asked.answer - 1}
    rows = {name: [text(length) + " " * (name == "prompt") for _ in range(count)] for name, length in columns.items()}
    return Dataset.from_dict(rows)


def check_lengths(trainer, asked: argparse.Namespace) -> None:
    """Raises SystemExit when a row of the trainer has other lengths than were asked for."""
    row = trainer.train_dataset[0]
    found = [len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    if found != [asked.prompt, asked.answer, asked.answer]:
        sys.exit(f"a row has {found} tokens of prompt, chosen and rejected answer, not what was asked for")


if __name__ == "__main__":
    main(sys.argv[1:])
