"""Models of a shape with random weights, made on the device: nothing is read from a disk."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.shapes import SHAPES
from burnish.engine.assemble import open_model
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.model.decoder import Decoder
from burnish.settings import AdapterSettings, ModelSettings, RunSettings

RANK, ALPHA = 16, 32.0
"""Of every LoRA here, on all linear layers, without dropout."""


def open_random(
    shape: str,
    storage: str,
    adapter: str,
    mesh: Mesh,
    memory: str = "auto",
    fp8: bool = False,
    furnish: Callable[[Decoder], None] | None = None,
) -> tuple[Decoder, str | None]:
    """The decoder with its adapter, as a recipe opens it, but from random weights; and the adapter's name."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        run = RunSettings(device=mesh.device.type, memory=memory, dtype="fp8" if fp8 else "auto")
        model = ModelSettings(path=folder, storage=storage, init="random")
        settings = AdapterSettings(kind=adapter, rank=RANK, alpha=ALPHA)
        return open_model(Start(Path(folder)), model, settings, run, mesh, furnish)
