"""Say what is installed, which device there is, and what works on it."""

import json
import platform
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from burnish.config import Settings, build
from burnish.engine.preflight import cuda_device_count
from burnish.settings import TrainingSettings


class Config(Settings):
    """The doctor takes no settings."""


def main(config: Config, as_json: bool) -> None:
    """Prints one line per check; raises ValueError when something that training needs does not work."""
    checks: dict[str, dict[str, Any]] = {name: _attempt(check) for name, check in CHECKS.items()}
    if as_json:
        print(json.dumps(checks))
    else:
        for name, found in checks.items():
            print(f"{'ok  ' if found['works'] else 'FAIL'} {name:<12} {found['says']}")
    broken = [name for name, found in checks.items() if not found["works"]]
    if broken:
        raise ValueError(f"does not work: {', '.join(broken)}")


def _attempt(check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"works": True, "says": check()}
    except Exception as error:  # a doctor reports every ailment, whatever it is
        return {"works": False, "says": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _machine() -> str:
    import psutil

    memory, free = psutil.virtual_memory().total / 2**30, shutil.disk_usage(Path.cwd()).free / 2**30
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    place = f"{platform.platform()}, Python {platform.python_version()}"
    return f"{place}, {cores} cores, {memory:.0f} GiB memory, {free:.0f} GiB disk free here"


def _packages() -> str:
    import torch

    from burnish.engine.environment import environment

    found = environment(torch.device("cpu"))
    return ", ".join(
        f"{name} {version}" for name, version in {"burnish": found["burnish"], **found["packages"]}.items()
    )


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        seen = cuda_device_count()
        if seen:
            raise RuntimeError(
                f"the driver shows {seen} CUDA device(s), but this PyTorch ({torch.__version__}) cannot use them"
            )
        return f"no CUDA device; run.device=auto trains on the CPU with {torch.get_num_threads()} threads"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}" for p in names)


def _training() -> str:
    """One forward and backward pass of the embedded model, on every storage, where the run would take place."""
    import torch

    from burnish.data.packing import collate
    from burnish.engine.assemble import open_model
    from burnish.engine.mesh import Mesh, device_kind
    from burnish.engine.start import Start
    from burnish.model.families import find_model
    from burnish.types import Sequence

    device = torch.device(device_kind("auto"))
    batch = collate([Sequence(tuple(range(5, 25)), (1.0,) * 20, 0)]).to(device)
    for storage in ("full", "bf16", "nf4"):
        settings = build(TrainingSettings, {"model": {"storage": storage}, "run": {"compile": "off"}})
        start = Start(find_model("embedded", None))
        decoder, name = open_model(start, settings.model, settings.adapter, settings.run, Mesh(device))
        loss = -decoder.log_probs(batch, name).sum()
        loss.backward()
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss on {storage} weights is {loss.item()}")
    return f"full, LoRA and QLoRA steps of the embedded model work on {device.type}"


def _kernels() -> str:
    import torch

    if not torch.cuda.is_available():
        return "not used without a CUDA device; results are the same, slower"
    if find_spec("triton") is None:
        return "triton is not installed: the plain PyTorch versions are used; results are the same, slower"
    return "triton is installed: NF4 weights are decoded in one launch"


CHECKS: dict[str, Callable[[], str]] = {
    "machine": _machine,
    "packages": _packages,
    "device": _device,
    "kernels": _kernels,
    "training": _training,
}
