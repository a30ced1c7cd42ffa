"""A random-weight Llama checkpoint and a word-level tokenizer in a folder, for libraries that load a model by name.

python -m benchmarks.peers.make_model SHAPE FOLDER

The weights are drawn on the device: 20 s for 7B into a folder in memory. Token i is the word "wi".
"""

import sys
import time

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.meter import here
from benchmarks.shapes import FIRST_ID, SHAPES

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}


def main(shape: str, folder: str) -> None:
    """Writes both."""
    began = time.perf_counter()
    config = LlamaConfig.from_dict(SHAPES[shape] | {"dtype": "bfloat16"})
    torch.manual_seed(0)
    with here():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    words = SPECIAL | {f"w{i}": i for i in range(FIRST_ID, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=config.max_position_embeddings,
    ).save_pretrained(folder)
    print(f"made {shape} in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
