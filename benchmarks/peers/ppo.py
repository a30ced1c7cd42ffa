"""PPO by TRL 1.12, its last release that has it, as a worker of `benchmarks/turns.py`: one turn, then it ends.

A LoRA policy of the shape in bf16, and a small reward and a small value model (350M beside 7B), trained with all their
weights, as TRL asks for separate models; one epoch, one minibatch; prompts of random ids, answers of a fixed length.
The trainer keeps its own defaults otherwise: activations are recomputed, micro-batches hold 8 answers.
"""

import argparse
import os
import random
import sys
import tempfile
import time

SMALL = {
    "full": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""350M, and what tries the script out on a CPU."""


def main(words: list[str]) -> None:
    """Trains for one turn, once it is asked to."""
    asked = read_arguments(words)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from benchmarks.meter import Meter, here
    from benchmarks.peers.gate import UpdateGate, versions
    from benchmarks.shapes import FIRST_ID

    device, updates = here(), asked.warm_up + asked.timed
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    tokenizer.padding_side = "left"
    policy = AutoModelForCausalLM.from_pretrained(
        asked.model, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": device}
    )
    small = LlamaConfig(**SMALL[asked.small], vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, dtype="bfloat16")

    def small_model() -> LlamaForSequenceClassification:
        torch.set_default_dtype(torch.bfloat16)
        with device:
            model = LlamaForSequenceClassification(small)
        torch.set_default_dtype(torch.float32)
        return model

    draw = random.Random(0)
    count = asked.prompts * updates
    prompts = [[draw.randrange(FIRST_ID, len(tokenizer)) for _ in range(asked.prompt)] for _ in range(count)]
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=asked.micro,
        gradient_accumulation_steps=asked.prompts // asked.micro,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=count,
        response_length=asked.answer,
        local_rollout_forward_batch_size=asked.prompts,
        num_sample_generations=0,
        temperature=1.0,
        bf16=True,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    gate = UpdateGate(Meter(asked.warm_up, asked.timed, device))
    gate.about = {"versions": versions("trl")}
    time_rollouts(gate)
    data = Dataset.from_dict({"input_ids": prompts})
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=small_model(),
        value_model=small_model(),
        train_dataset=data,
        eval_dataset=data.select(range(asked.micro)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[gate],
    ).train()


def time_rollouts(gate) -> None:
    """Has the gate told how long each update's generation takes."""
    import torch
    from trl.experimental.ppo import ppo_trainer

    generate = ppo_trainer.batch_generation

    def timed(*args, **given):
        began = time.perf_counter()
        found = generate(*args, **given)
        if gate.meter.device.type == "cuda":
            torch.cuda.synchronize()
        gate.rollouts.append(time.perf_counter() - began)
        return found

    ppo_trainer.batch_generation = timed


def read_arguments(words: list[str]) -> argparse.Namespace:
    """What the worker is to do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--small", choices=tuple(SMALL), default="full")
    for name, value in (("prompts", 64), ("prompt", 256), ("answer", 256), ("micro", 8), ("warm-up", 1), ("timed", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args(words)


if __name__ == "__main__":
    main(sys.argv[1:])
