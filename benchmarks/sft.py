"""Tokens per second and peak memory of one training step on a CUDA device, random weights of a real shape.

python benchmarks/sft.py [shape=llama-2-7b] [storage=nf4] [adapter=lora] [checkpointing=false] [sequences=4]
                         [length=2048] [commit=HASH] [note=TEXT]

Every token is scored, sequences have one length, LoRA has rank 16 on all linear layers: the work that the peers in
`results.csv` were given. The time of a step is the median after warm-up, device synchronised at both ends; the peak is
`torch.cuda.max_memory_allocated` over the timed steps. One row is added to results.csv.
"""

import csv
import difflib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from burnish.data.packing import collate
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.model.adapters import ADAPTERS
from burnish.model.storage import STORAGES
from burnish.settings import AdapterSettings, ModelSettings, OptimSettings, RunSettings
from burnish.types import Batch, Sequence

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = [
    "date",
    "commit",
    "device",
    "torch",
    "benchmark",
    "system",
    "shape",
    "storage",
    "adapter",
    "rank",
    "checkpointing",
    "tokens_per_step",
    "step_seconds",
    "tokens_per_second",
    "peak_allocated_gib",
    "peak_reserved_gib",
    "compile_seconds",
    "note",
]
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
SHAPES = {
    "llama-2-7b": LLAMA
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rope_theta": 10000.0},
    "llama-3.1-8b": LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0},
}
WORDS = {
    "shape": "llama-2-7b",
    "storage": "nf4",
    "adapter": "lora",
    "checkpointing": "false",
    "sequences": "4",
    "length": "2048",
    "commit": "",
    "note": "",
}
"""What can be asked for, and what is measured where it is not."""
WARM_UP, TIMED = 4, 10


def main(asked: Mapping[str, str]) -> None:
    """Measures what is asked for, prints the row and adds it to results.csv."""
    shape, storage, adapter = asked["shape"], asked["storage"], asked["adapter"]
    checkpointing = asked["checkpointing"] == "true"
    num_sequences, length = int(asked["sequences"]), int(asked["length"])
    device = torch.device("cuda")
    mesh = Mesh(device)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        run = RunSettings(device="cuda", checkpointing=checkpointing, microbatch_tokens=num_sequences * length)
        model = ModelSettings(path=folder, storage=storage, init="random")
        began = time.perf_counter()
        decoder, name = open_model(Start(Path(folder)), model, AdapterSettings(kind=adapter), run, mesh)
        torch.cuda.synchronize()
        print(f"model of {shape} on the card in {time.perf_counter() - began:.1f} s", flush=True)
    learner = open_learner(decoder, name, OptimSettings(lr=1e-4, schedule="constant", warmup=0), WARM_UP + TIMED, mesh)
    batches = [random_batch(num_sequences, length, SHAPES[shape]["vocab_size"], seed) for seed in range(4)]

    def objective(batch: Batch):
        scores = decoder.score(batch, name)
        return cross_entropy(scores.log_probs, batch.weights, scores.correct)

    times: list[float] = []
    for step in range(WARM_UP + TIMED):
        if step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        metrics = learner.step([batches[step % len(batches)]], objective, lambda batch: batch.total_weight)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        print(f"step {step}: {times[-1]:.3f} s, loss {metrics['loss']:.4f}", flush=True)
    seconds = sorted(times[WARM_UP:])[TIMED // 2]
    tokens = num_sequences * length
    write_row(
        {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": asked["commit"] or current_commit(),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "benchmark": "sft",
            "system": "burnish",
            "shape": shape,
            "storage": storage,
            "adapter": adapter,
            "rank": 16,
            "checkpointing": checkpointing,
            "tokens_per_step": tokens,
            "step_seconds": f"{seconds:.4f}",
            "tokens_per_second": f"{tokens / seconds:.0f}",
            "peak_allocated_gib": f"{torch.cuda.max_memory_allocated() / 2**30:.2f}",
            "peak_reserved_gib": f"{torch.cuda.max_memory_reserved() / 2**30:.2f}",
            "compile_seconds": f"{times[0]:.1f}",
            "note": asked["note"],
        }
    )


def read_words(words: list[str]) -> dict[str, str]:
    """Every word of `WORDS`, with the value that is asked for. Raises ValueError naming the word that is wrong."""
    asked = dict(WORDS)
    for word in words:
        key, _, value = word.partition("=")
        if key not in WORDS or "=" not in word:
            nearest = difflib.get_close_matches(key, WORDS, n=1)
            hint = f"did you mean {nearest[0]}=...?" if nearest else f"known are {', '.join(WORDS)}"
            raise ValueError(f"{word} is not known: {hint}")
        asked[key] = value
    known = {"shape": SHAPES, "storage": STORAGES, "adapter": ("none", *ADAPTERS), "checkpointing": ("true", "false")}
    for key, allowed in known.items():
        if asked[key] not in allowed:
            raise ValueError(f"{key}={asked[key]} is not known: write one of {', '.join(allowed)}")
    for key in ("sequences", "length"):
        if not asked[key].isdecimal() or int(asked[key]) < 1:
            raise ValueError(f"{key}={asked[key]} must be a whole number above 0")
    return asked


def current_commit() -> str:
    """The short hash of the commit that is measured; empty outside a git checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def random_batch(num_sequences: int, length: int, vocab_size: int, seed: int) -> Batch:
    """Sequences of random ids on the device, every token scored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab_size, (num_sequences, length), generator=generator).tolist()
    return collate([Sequence(tuple(row), (1.0,) * length, i) for i, row in enumerate(ids)]).to("cuda")


def write_row(row: dict[str, object]) -> None:
    """Print the row, and append it to results.csv."""
    print(" ".join(f"{key}={value}" for key, value in row.items()))
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    try:
        asked = read_words(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"benchmarks/sft.py: {error}")
    main(asked)
