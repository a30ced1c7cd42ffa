"""Tokens per second of the sampler on a CUDA device, random weights of a real shape.

python -m benchmarks.sampler [shape=llama-2-7b] [storage=bf16] [adapter=lora] [slots=64] [prompts=64] [prompt=256]
                             [answer=256] [graphs=true] [dense=auto] [results=FILE] [commit=HASH] [note=TEXT]

Random prompts of one length, no end token, so that every answer has the length that is asked for; drawn at temperature
1. A call is timed from its prompts to its answers, reading the prompts and capturing graphs included, the median after
warm-up. One row is added to results.csv; `step_seconds` is those of a call, `tokens_per_second` those that it wrote.
"""

import random
import sys
import time
from collections.abc import Mapping

from benchmarks.meter import Meter, here, needs_cuda, stamp
from benchmarks.models import RANK, open_random
from benchmarks.rows import read_words as read
from benchmarks.rows import write_row
from benchmarks.shapes import FIRST_ID, SHAPES
from benchmarks.turns import median
from burnish.engine.mesh import Mesh
from burnish.model.adapters import ADAPTERS
from burnish.model.storage import STORAGES
from burnish.sampling.sampler import Sampler, Sampling

WORDS = {
    "shape": "llama-2-7b",
    "storage": "bf16",
    "adapter": "lora",
    "slots": "64",
    "prompts": "64",
    "prompt": "256",
    "answer": "256",
    "graphs": "true",
    "dense": "auto",
    "results": "",
    "commit": "",
    "note": "",
}
"""What can be asked for, and what is measured where it is not."""
CHOICES = {"shape": SHAPES, "storage": STORAGES, "adapter": ("none", *ADAPTERS)}
CHOICES |= {"graphs": ("true", "false"), "dense": ("auto", "true", "false")}
NUMBERS = ("slots", "prompts", "prompt", "answer")
WARM_UP, TIMED = 1, 3


def main(asked: Mapping[str, str]) -> None:
    """Measures what is asked for, prints the row and adds it to results.csv."""
    needs_cuda("benchmarks/sampler.py", asked["shape"])
    slots, count, length, answer = (int(asked[key]) for key in NUMBERS)
    mesh, dense = Mesh(here()), {"auto": None, "true": True, "false": False}[asked["dense"]]
    began = time.perf_counter()
    decoder, name = open_random(asked["shape"], asked["storage"], asked["adapter"], mesh)
    print(f"model of {asked['shape']} on the device in {time.perf_counter() - began:.1f} s", flush=True)
    sampler = Sampler(decoder, slots, mesh, graphs=asked["graphs"] == "true", dense=dense)
    draw, vocab_size = random.Random(0), SHAPES[asked["shape"]]["vocab_size"]
    meter, full, calls = Meter(WARM_UP, TIMED, mesh.device), False, 0
    while not full:
        prompts = [[draw.randrange(FIRST_ID, vocab_size) for _ in range(length)] for _ in range(count)]
        meter.begin()
        written = sampler.write(prompts, Sampling(answer, temperature=1.0), name, range(count))
        full, calls = meter.end(), calls + 1
        assert all(len(one.ids) == answer for one in written)
        print(f"call {calls}: {count} answers", flush=True)
    turn = meter.reading()
    seconds = median(turn["seconds"])
    write_row(
        {
            **stamp(asked["commit"]),
            "benchmark": "sampler",
            "system": "burnish",
            "shape": asked["shape"],
            "storage": asked["storage"],
            "adapter": asked["adapter"],
            "rank": RANK,
            "tokens_per_step": count * answer,
            "step_seconds": f"{seconds:.4f}",
            "tokens_per_second": f"{count * answer / seconds:.0f}",
            "peak_allocated_gib": f"{turn['allocated']:.2f}",
            "peak_reserved_gib": f"{turn['reserved']:.2f}",
            "note": asked["note"],
            "samples_per_second": f"{count / seconds:.2f}",
            "settings": " ".join(f"{key}={asked[key]}" for key in (*NUMBERS, "graphs", "dense")),
        },
        asked["results"],
    )


def read_words(words: list[str]) -> dict[str, str]:
    """Every word of `WORDS`, with the value that is asked for. Raises ValueError naming the word that is wrong."""
    return read(words, WORDS, CHOICES, NUMBERS)


if __name__ == "__main__":
    try:
        asked = read_words(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"benchmarks/sampler.py: {error}")
    main(asked)
