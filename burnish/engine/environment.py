"""What a run ran on: versions, device and commit, for its environment.json and for `burnish doctor`."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import burnish

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pydantic", "transformers", "peft", "bitsandbytes")


def environment(device: torch.device, world: int = 1) -> dict[str, Any]:
    """Versions, device and commit as a JSON object."""
    return {
        "burnish": burnish.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({torch.get_num_threads()} threads)",
        "cuda": torch.version.cuda,
        "ranks": world,
        "command": sys.argv[1:],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree that this package runs from, or None when it was installed from elsewhere."""
    root = Path(burnish.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
