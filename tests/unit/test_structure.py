"""What scripts/structure.py finds in small sources."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "structure.py"


def load(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


structure = load(SCRIPT)

DISTRIBUTED = "torch.distributed is spoken in engine/ only"
KERNELS = "kernels are imported by ops/ and optim/ only"


def problems(path: str, source: str) -> list[str]:
    return list(structure.import_problems(Path(path), ast.parse(source)))


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("burnish/ops/a.py", "import torch.distributed as dist", DISTRIBUTED),
        ("burnish/ops/a.py", "import torch.distributed.fsdp", DISTRIBUTED),
        ("burnish/ops/a.py", "from torch import distributed", DISTRIBUTED),
        ("burnish/ops/a.py", "from torch.distributed import all_reduce", DISTRIBUTED),
        ("burnish/ops/a.py", "def f():\n    from torch import distributed", DISTRIBUTED),
        ("burnish/ops/a.py", "import torch\ntorch.distributed.barrier()", DISTRIBUTED),
        ("burnish/model/a.py", "import burnish.kernels.nf4", KERNELS),
        ("burnish/model/a.py", "from burnish import kernels", KERNELS),
        ("burnish/model/a.py", "from burnish.kernels import nf4", KERNELS),
        ("burnish/model/a.py", "from ..kernels.nf4 import dequantise", KERNELS),
        ("burnish/model/a.py", "from .. import kernels", KERNELS),
        ("burnish/losses/a.py", "from burnish.model.decoder import Decoder", "not burnish.model.decoder.Decoder"),
        ("burnish/losses/a.py", "from burnish import ops", "not burnish.ops"),
        ("burnish/losses/a.py", "from burnish.ops import nf4", "not burnish.ops.nf4"),
        ("burnish/losses/a.py", "from ..model.decoder import Decoder", "not burnish.model.decoder.Decoder"),
        ("burnish/config.py", "import torch", "torch is imported at the top"),
        ("burnish/config.py", "import torch.nn", "torch.nn is imported at the top"),
        ("burnish/cli.py", "from torch import nn", "torch.nn is imported at the top"),
        ("burnish/cli.py", "try:\n    import torch\nexcept ImportError:\n    pass", "torch is imported at the top"),
        ("burnish/cli.py", "class A:\n    import torch", "torch is imported at the top"),
    ],
)
def test_an_import_that_is_not_allowed_is_found_however_it_is_written(path: str, source: str, problem: str) -> None:
    found = problems(path, source)
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")
    assert problem in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("burnish/engine/a.py", "from torch import distributed"),
        ("burnish/ops/a.py", "from torch import nn\nimport torch.distributions"),
        ("burnish/ops/a.py", "def f():\n    from burnish.kernels.nf4 import dequantise"),
        ("burnish/kernels/a.py", "from . import nf4"),
        ("burnish/losses/a.py", "from burnish.ops import sequences\nfrom burnish.types import Batch\nimport torch"),
        ("burnish/model/a.py", "import torch"),
        ("burnish/cli.py", "def f():\n    import torch\n    from torch import nn"),
        ("burnish/cli.py", "import torchless\nfrom burnish import files"),
        ("burnish/cli.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_an_import_that_is_allowed_is_let_pass(path: str, source: str) -> None:
    assert problems(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        (
            "burnish/data/utils.py",
            "",
            "a file with this name has no subject; a function without a home is a missing noun",
        ),
        ("burnish/data/a.py", "x = 1\n" * 401, "401 lines, over 400"),
        ("burnish/recipes/sft.py", "loss.backward()", "a recipe may not contain .backward("),
        ("burnish/engine/learner.py", "x = 1  # as DPO does", "the learner names the method dpo"),
    ],
)
def test_a_file_that_breaks_a_rule_is_named(path: str, source: str, problem: str) -> None:
    assert [found.removeprefix(f"{path}: ") for found in structure.file_problems(Path(path), source)] == [problem]


def test_a_file_within_its_budget_is_let_pass() -> None:
    assert list(structure.file_problems(Path("burnish/data/a.py"), "x = 1\n" * 400)) == []
    assert list(structure.file_problems(Path("burnish/engine/run.py"), "loss.backward()  # as DPO does")) == []


@pytest.mark.parametrize(
    ("source", "problems"),
    [
        ("def f(self, a, b, c, d, /, e, f, *, g, h):" + "\n    pass" * 79, []),
        ("def f(a, b, c, d, e, f, g, *, h, i):\n    pass", ["f has 9 arguments, over 8"]),
        ("def f():" + "\n    pass" * 80, ["f has 81 lines, over 80"]),
    ],
)
def test_a_function_that_is_too_large_is_named(source: str, problems: list[str]) -> None:
    function = ast.parse(source).body[0]
    assert [line.removeprefix("a.py:1: ") for line in structure.function_problems(Path("a.py"), function)] == problems
