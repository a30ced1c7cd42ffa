"""SFT by TRL or Unsloth, as a worker of `benchmarks/turns.py`: a turn is so many warm-up steps and so many timed ones.

The one argument is JSON: what `benchmarks/sft.py` was asked for, and the setting of the peer. Rows of random ids, every
token trained on, LoRA on all linear layers without dropout, or all weights. `batch=default` leaves TRL everything that
it does by itself. Tokens are counted in what the trainer is handed, padding left out.
"""

import json
import os
import sys
import tempfile
from types import SimpleNamespace


def main(words: list[str]) -> None:
    """Trains for as many turns as will be asked for, waiting before each."""
    asked = SimpleNamespace(**json.loads(words[0]))
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"})
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # a cache shared with another worker would save it the work
    if asked.system == "unsloth":
        import unsloth  # noqa: F401, before what it patches
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from benchmarks.meter import Meter, here
    from benchmarks.peers.gate import Gate, versions
    from benchmarks.peers.systems import open_system

    device = here()
    model, adapter = open_system(asked, device)
    gate = Gate(Meter(asked.warm_up, asked.timed, device))
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=asked.turns * (asked.warm_up + asked.timed),
        max_length=asked.length,
        use_cpu=device.type == "cpu",
        dataset_num_proc=1,
        report_to="none",
        save_strategy="no",
        seed=0,
        **settings_of(asked, device.type == "cuda"),
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows(asked),
        processing_class=AutoTokenizer.from_pretrained(asked.model),
        peft_config=adapter,
        callbacks=[gate],
    )
    count_tokens(trainer, gate.meter)
    gate.about = {
        "versions": versions(*(["unsloth", "unsloth_zoo"] if asked.system == "unsloth" else []), "trl", "bitsandbytes"),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "load_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
    }
    trainer.train()


def settings_of(asked: SimpleNamespace, on_card: bool) -> dict[str, object]:
    """The arguments of the trainer that the setting decides."""
    if asked.batch == "default":
        return {}
    given: dict[str, object] = {
        "per_device_train_batch_size": asked.batch,
        "gradient_accumulation_steps": 1,  # Unsloth's own default is 2
        "bf16": True,
        "optim": asked.optimizer if on_card else "adamw_torch",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "gradient_checkpointing": asked.checkpointing,
        "packing": asked.packing,
        "dataloader_num_workers": 0,
    }
    if asked.system == "trl":
        given["use_liger_kernel"] = asked.liger and on_card
        if asked.checkpointing:
            given["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return given


def rows(asked: SimpleNamespace):
    """The rows as the trainer reads them; ragged ones are given to Unsloth as text, as its own documents do."""
    from datasets import Dataset

    from benchmarks.workload import rows_of

    per_step = asked.batch if isinstance(asked.batch, int) else 1
    told = {key: str(getattr(asked, key)) for key in ("shape", "lengths", "length")}
    ids = rows_of(told, per_step * asked.turns * (asked.warm_up + asked.timed))
    if asked.system == "unsloth":
        if asked.lengths != "fixed":
            return Dataset.from_dict({"text": [" ".join(f"w{number}" for number in row) for row in ids]})
        return Dataset.from_dict({"input_ids": ids, "labels": ids})
    return Dataset.from_dict({"input_ids": ids})


def count_tokens(trainer, meter) -> None:
    """Has the meter told how many tokens each step is handed. The padding token is no token of any row."""
    step, padding = trainer.training_step, trainer.processing_class.pad_token_id

    def counted(model, inputs, *args, **given):
        meter.count((inputs["input_ids"] != padding).sum())
        return step(model, inputs, *args, **given)

    trainer.training_step = counted


if __name__ == "__main__":
    main(sys.argv[1:])
