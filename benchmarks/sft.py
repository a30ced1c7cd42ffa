"""Tokens per second and peak memory of one training step on a CUDA device, random weights of a real shape.

python -m benchmarks.sft [shape=llama-2-7b] [storage=nf4] [adapter=lora] [checkpointing=false] [sequences=4]
                         [length=2048] [results=FILE] [commit=HASH] [note=TEXT]

Every token is scored, sequences have one length, LoRA has rank 16 on all linear layers: the work that the peers in
`results.csv` were given. The time of a step is the median after warm-up, device synchronised at both ends; the peak is
`torch.cuda.max_memory_allocated` over the timed steps. One row is added to results.csv.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.meter import Meter, device_name, here
from benchmarks.models import RANK, open_random
from benchmarks.rows import current_commit, write_row
from benchmarks.rows import read_words as read
from benchmarks.shapes import FIRST_ID, SHAPES
from benchmarks.turns import median
from burnish.data.packing import collate
from burnish.engine.assemble import open_learner
from burnish.engine.mesh import Mesh
from burnish.losses.likelihood import cross_entropy
from burnish.model.adapters import ADAPTERS
from burnish.model.storage import STORAGES
from burnish.settings import OptimSettings
from burnish.types import Batch, Sequence

WORDS = {
    "shape": "llama-2-7b",
    "storage": "nf4",
    "adapter": "lora",
    "checkpointing": "false",
    "sequences": "4",
    "length": "2048",
    "results": "",
    "commit": "",
    "note": "",
}
"""What can be asked for, and what is measured where it is not."""
CHOICES = {"shape": SHAPES, "storage": STORAGES, "adapter": ("none", *ADAPTERS), "checkpointing": ("true", "false")}
WARM_UP, TIMED = 4, 10


def main(asked: Mapping[str, str]) -> None:
    """Measures what is asked for, prints the row and adds it to results.csv."""
    num_sequences, length = int(asked["sequences"]), int(asked["length"])
    checkpointing = asked["checkpointing"] == "true"
    mesh = Mesh(here())
    began = time.perf_counter()
    decoder, name = open_random(asked["shape"], asked["storage"], asked["adapter"], mesh, checkpointing)
    print(f"model of {asked['shape']} on the device in {time.perf_counter() - began:.1f} s", flush=True)
    learner = open_learner(decoder, name, OptimSettings(lr=1e-4, schedule="constant", warmup=0), WARM_UP + TIMED, mesh)
    vocab_size = SHAPES[asked["shape"]]["vocab_size"]
    batches = [random_batch(num_sequences, length, vocab_size, seed).to(mesh.device) for seed in range(4)]

    def objective(batch: Batch):
        scores = decoder.score(batch, name)
        return cross_entropy(scores.log_probs, batch.weights, scores.correct)

    meter = Meter(WARM_UP, TIMED, mesh.device)
    full = False
    while not full:
        meter.begin()
        metrics = learner.step([batches[learner.steps_taken % 4]], objective, lambda batch: batch.total_weight)
        full = meter.end()
        print(f"step {learner.steps_taken}: loss {metrics['loss']:.4f}", flush=True)
    turn = meter.reading()
    seconds, tokens = median(turn["seconds"]), num_sequences * length
    write_row(
        {
            "commit": asked["commit"] or current_commit(),
            "device": device_name(mesh.device),
            "torch": torch.__version__,
            "benchmark": "sft",
            "system": "burnish",
            "shape": asked["shape"],
            "storage": asked["storage"],
            "adapter": asked["adapter"],
            "rank": RANK,
            "checkpointing": checkpointing,
            "tokens_per_step": tokens,
            "step_seconds": f"{seconds:.4f}",
            "tokens_per_second": f"{tokens / seconds:.0f}",
            "peak_allocated_gib": f"{turn['allocated']:.2f}",
            "peak_reserved_gib": f"{turn['reserved']:.2f}",
            "compile_seconds": f"{turn['first']:.1f}",
            "note": asked["note"],
        },
        Path(asked["results"]) if asked["results"] else None,
    )


def read_words(words: list[str]) -> dict[str, str]:
    """Every word of `WORDS`, with the value that is asked for. Raises ValueError naming the word that is wrong."""
    return read(words, WORDS, CHOICES, ("sequences", "length"))


def random_batch(num_sequences: int, length: int, vocab_size: int, seed: int) -> Batch:
    """Sequences of random ids, every token scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_ID, vocab_size, (num_sequences, length), generator=generator).tolist()
    return collate([Sequence(tuple(row), (1.0,) * length, i) for i, row in enumerate(ids)])


if __name__ == "__main__":
    try:
        asked = read_words(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"benchmarks/sft.py: {error}")
    main(asked)
