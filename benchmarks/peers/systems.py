"""The models of both peers, with their LoRA, as their own documents say for speed.

`asked` names what is wanted: system, model (a folder), storage (nf4, bf16; `full...` trains every weight), length,
rank, alpha, checkpointing, attention.
"""

from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def open_system(asked: Any, device: Any) -> tuple[Any, Any]:
    """The model, and what the trainer is to lay on it (None: the model has it already, or all weights train)."""
    return (open_unsloth(asked), None) if asked.system == "unsloth" else open_trl(asked, device)


def open_unsloth(asked: Any) -> Any:
    """Unsloth's model with its LoRA and, where asked, its own checkpointing."""
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        asked.model,
        max_seq_length=asked.length,
        dtype=torch.bfloat16,
        load_in_4bit=asked.storage == "nf4",
        full_finetuning=asked.storage.startswith("full"),
        local_files_only=True,
    )
    if asked.storage.startswith("full"):
        return model
    return FastLanguageModel.get_peft_model(
        model,
        r=asked.rank,
        lora_alpha=asked.alpha,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if asked.checkpointing else False,
        random_state=0,
    )


def open_trl(asked: Any, device: Any) -> tuple[Any, Any]:
    """The model, NF4 by bitsandbytes (bf16 on a CPU), and PEFT's LoRA for the trainer to lay on it."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from benchmarks.peers import varlen

    attention = asked.attention if device.type == "cuda" else "sdpa"
    if attention == varlen.NAME:
        varlen.register()
    given: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": attention}
    if device.type == "cuda":
        given["device_map"] = {"": 0}
        if asked.storage == "nf4":
            given["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
    model = AutoModelForCausalLM.from_pretrained(asked.model, **given)
    if asked.storage.startswith("full"):
        return model, None
    lora = LoraConfig(
        r=asked.rank, lora_alpha=asked.alpha, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return model, lora
