"""Folders with a model of a shape, random weights, for what loads a model from a disk; best in memory, /dev/shm.

python -m benchmarks.checkpoints SHAPE FOLDER

FOLDER/ended is the model with an end token, FOLDER/endless the same weights without one, so that every answer has the
length that is asked for; FOLDER/reward is a LoRA of that model with a scalar head. Token i is the word "wi".
FOLDER/shape names the shape, when all is there: benchmarks with scratch=PARENT then use PARENT/model, and leave it.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.meter import here
from benchmarks.models import ALPHA, RANK
from benchmarks.shapes import FIRST_ID, SHAPES
from burnish.engine.rewards import REWARD
from burnish.model.adapter_files import save_adapter
from burnish.model.adapters import AdapterSpec, add_adapter
from burnish.model.checkpoint import init_model, save_model
from burnish.model.heads import add_head

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
"""Nothing but the words of a conversation: a prompt has as many tokens as words."""


def main(shape: str, folder: Path) -> None:
    """Writes the three folders."""
    began = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    device = here()
    with tempfile.TemporaryDirectory() as source:
        write_words(Path(source), SHAPES[shape], ends=False)
        decoder = init_model(Path(source), 0, "bf16", device, torch.bfloat16)
        save_model(decoder, folder / "endless", Path(source))
    width = SHAPES[shape]["hidden_size"]
    add_adapter(decoder, REWARD, AdapterSpec(rank=RANK, alpha=ALPHA), torch.Generator().manual_seed(0))
    add_head(decoder, REWARD, width, torch.Generator().manual_seed(0))
    base, about = str(folder / "endless"), {"kind": REWARD}
    save_adapter(decoder, REWARD, folder / "reward", base, folder / "endless", about=about, head=REWARD)
    (folder / "ended").mkdir()
    for path in (folder / "endless").glob("model*.safetensors*"):
        (folder / "ended" / path.name).symlink_to(path.resolve())
    write_words(folder / "ended", SHAPES[shape], ends=True)
    (folder / "shape").write_text(shape)
    print(f"{shape} in {folder} after {time.perf_counter() - began:.0f} s", flush=True)


def write_words(folder: Path, shape: dict[str, object], ends: bool) -> None:
    """The configuration of the model and a tokenizer of words, with an end token or without."""
    config = shape | {"dtype": "bfloat16"} | ({} if ends else {"eos_token_id": None})
    (folder / "config.json").write_text(json.dumps(config))
    words = {token: number for number, token in enumerate(SPECIAL.values())}
    words |= {f"w{number}": number for number in range(FIRST_ID, shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Any special token at a turn's end would be taken for an end token, even that of unknown words.
    named = {key: token for key, token in SPECIAL.items() if ends or key not in ("eos_token", "unk_token")}
    tokenizer.add_special_tokens(list(named.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        print(
            f"usage: python -m benchmarks.checkpoints SHAPE FOLDER\nSHAPE is one of {', '.join(SHAPES)}",
            file=sys.stderr,
        )
        sys.exit(2)
    main(sys.argv[1], Path(sys.argv[2]))
