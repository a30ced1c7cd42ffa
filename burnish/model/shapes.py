"""The shapes of published models, as their config.json says them, for random weights. Imports nothing."""

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}

SHAPES = {
    "llama-2-7b": _LLAMA
    | _IDS
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rope_theta": 10000.0},
    "llama-3.1-8b": _LLAMA
    | _IDS
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0},
    "llama-65b": _LLAMA
    | _IDS
    | {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 64, "max_position_embeddings": 2048, "rope_theta": 10000.0},
    "qwen-2.5-0.5b": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
    | _IDS
    | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "use_sliding_window": False}
    | {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6},
    "tiny": _LLAMA
    | _IDS
    | {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 10000.0},
}
"""`tiny` tries things out on a CPU."""
FIRST_ID = 4
"""Ids below it are special; what is drawn at random starts here."""
