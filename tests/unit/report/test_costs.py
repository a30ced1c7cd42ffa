"""What methods cost, as the terminal shows it: figures side by side, and each plan in words."""

from typing import Any

import pytest

from burnish.config import build
from burnish.engine.memory import CLASSES, Explained
from burnish.engine.trial import Cost
from burnish.model.shelf import NAMES, Plan, keep_everything
from burnish.report.costs import WIDTH, Row, cost_lines, values
from burnish.settings import TrainingSettings

GIB = 2**30
ABOUT: dict[str, Any] = {
    "model": "llama-65b",
    "random": True,
    "layers": 80,
    "width": 8192,
    "parameters": 65_285_660_672,
    "device": "NVIDIA H100 80GB HBM3",
    "cap": "48GB",
    "length": 2048,
    "sequences": 1,
}


def cost(**given: Any) -> Cost:
    sizes = dict.fromkeys(CLASSES, 0) | {"weights": 33 * GIB, "workspace": 3 * GIB // 2}
    known = {
        "opened": 12.3,
        "first": 65.0,
        "step": 1.25,
        "tokens": 2048.0,
        "peak": Explained(sum(sizes.values()), "backward pass", sizes),
        "reserved": 40 * GIB,
        "trained": 799_539_200,
        "dtype": "bf16",
        "plan": keep_everything(80),
        "again": False,
        "host": 0,
        "states_away": 0,
        "embedding_away": False,
        "graphs": False,
        "taken": False,
        "twice": False,
        "limit": None,
    }
    return Cost(**known | given)


def row(name: str = "QLoRA", **given: Any) -> Row:
    groups = {"model": {"storage": "nf4"}, "adapter": {"rank": 64}, "run": {"memory": "48GB"}}
    return Row(name, "sft", build(TrainingSettings, groups), "", cost(**given))


def test_a_row_is_read_at_a_glance() -> None:
    lines = cost_lines(ABOUT, [row()])
    assert lines[:2] == [
        "llama-65b, random weights: 80 layers, 8,192 wide, 65.3B parameters",
        "NVIDIA H100 80GB HBM3, capped at 48GB; a step: 1 x 2,048 tokens",
    ]
    table = {line[:15].strip(): line[15:].strip() for line in lines[4:] if not line.startswith("QLoRA")}
    assert table["tokens a second"] == "1,638"
    assert table["ms a step"] == "1,250"
    assert (table["first step"], table["model ready in"], table["trained"]) == ("1 min 05 s", "12 s", "800M")
    assert (table["peak allocated"], table["weights"], table["workspace"]) == ("34.5 GiB", "33.0 GiB", "1.50 GiB")
    assert (table["gradients"], table["peak is in"], table["peak reserved"]) == ("0", "backward", "40.0 GiB")
    assert lines[-2].startswith("QLoRA: keeps everything; model.storage=nf4 adapter.kind=lora adapter.rank=64 ")


TIGHT = Plan(
    tuple(frozenset[str]() if block < 60 else frozenset({"x"}) for block in range(80)),
    tuple(frozenset({"x", "attention"}) if block < 60 else frozenset[str]() for block in range(80)),
    tile=1024,
)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"plan": Plan((frozenset(NAMES),) * 80, (frozenset(),) * 80, 12)}, "weights of 12 blocks decoded"),
        (
            {"plan": TIGHT, "host": 3 * GIB},
            "keeps inputs of 20 blocks; on the host (3.00 GiB) inputs of 60 blocks, attention of 60 blocks; computes "
            "again q/k/v, attention of 20 blocks, MLP inputs, gate/up; MLPs on 1,024 tokens at a time; model.storage",
        ),
        ({"plan": None, "again": True}, "computes every block again; model.storage=nf4"),
        ({"states_away": GIB, "embedding_away": True}, "states on the host (1.00 GiB); the embedding on the host;"),
        ({"graphs": True}, "CUDA graphs, whose memory is in what is reserved alone"),
        ({"taken": True}, "keeps everything; gradients of one layer at a time; model.storage"),
        ({"taken": True, "twice": True}, "each step computed twice for their norm (optim.clip=0 needs none)"),
        ({"limit": 1024}, "micro-batches divided to 1,024 tokens, since memory did not suffice"),
    ],
)
def test_what_a_plan_did_is_told_in_words(given: dict[str, Any], said: str) -> None:
    lines = cost_lines(ABOUT, [row(**given)])
    assert said in " ".join(line.strip() for line in lines)
    assert max(map(len, lines)) <= WIDTH


def test_what_could_not_be_measured_has_dashes_and_a_reason() -> None:
    failed = Row("full", "sft", None, "run.memory=4GB is too little")
    lines = cost_lines(ABOUT, [failed, row("qlora")])
    assert next(line for line in lines if line.startswith("tokens a second")).split() == [
        *("tokens", "a", "second"),
        *("\N{EN DASH}", "1,638"),
    ]
    assert "full: run.memory=4GB is too little" in lines
    assert values(failed) == {"name": "full", "method": "sft", "settings": {}, "problem": failed.problem}
    assert values(row())["tokens_per_second"] == 2048 / 1.25


def test_only_on_a_cpu_it_is_said_how_memory_was_counted() -> None:
    assert not any(line.startswith("On a CPU") for line in cost_lines(ABOUT, [row()]))
    assert cost_lines(ABOUT, [row(reserved=None)])[-1].startswith("On a CPU")
