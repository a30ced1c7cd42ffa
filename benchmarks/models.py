"""Models of a shape with random weights, made on the device: nothing is read from a disk."""

import json
import tempfile
from pathlib import Path

from benchmarks.shapes import SHAPES
from burnish.engine.assemble import open_model
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.model.decoder import Decoder
from burnish.settings import AdapterSettings, ModelSettings, OptimSettings, RunSettings

RANK, ALPHA = 16, 32.0
"""Of every LoRA here, on all linear layers, without dropout."""


def open_random(
    shape: str,
    storage: str,
    adapter: str,
    mesh: Mesh,
    memory: str = "auto",
    fp8: bool = False,
    tokens: int = 4096,
    optim: OptimSettings | None = None,
) -> tuple[Decoder, str | None]:
    """The decoder with its adapter, as a recipe opens it, but from random weights; and the adapter's name.

    What it keeps for the backward pass is planned for batches of at most so many tokens, beside this optimizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        dtype = "fp8" if fp8 else "auto"
        run = RunSettings(device=mesh.device.type, memory=memory, dtype=dtype, microbatch_tokens=tokens)
        model = ModelSettings(path=folder, storage=storage, init="random")
        settings = AdapterSettings(kind=adapter, rank=RANK, alpha=ALPHA)
        return open_model(Start(Path(folder)), model, settings, run, mesh, optim=optim)
