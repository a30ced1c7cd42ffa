"""`burnish bench` on a CPU: what it prints, what adds up, and what it says to words that are wrong."""

import json
import time
from typing import Any

import pytest
import torch

from burnish.cli import main
from burnish.engine import trial
from burnish.engine.memory import CLASSES
from burnish.model.decoder import Decoder
from burnish.report.costs import WIDTH
from burnish.report.units import ABSENT
from tests.tiny import instead

TINY = ["bench", "model.shape=tiny", "run.device=cpu", "run.steps=1", "length=32"]


def as_json(capsys: pytest.CaptureFixture[str], *words: str):
    capsys.readouterr()
    assert main(instead(TINY, *words, "--json")) == 0
    return json.loads(capsys.readouterr().out)


def test_methods_side_by_side_each_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "compare=[full,full16,lora,qlora,dpo]", "sequences=2")
    assert [row["name"] for row in found["rows"]] == ["full", "full16", "lora", "qlora", "dpo"]
    assert (found["model"], found["random"], found["sequences"], found["length"]) == ("tiny", True, 2, 32)
    for row in found["rows"]:
        assert tuple(row["classes"]) == CLASSES
        assert sum(row["classes"].values()) == row["peak_bytes"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"])
        assert row["reserved_bytes"] is None
    full, full16, lora, qlora, dpo = found["rows"]
    assert full["trained_parameters"] == found["parameters"] > 3 * lora["trained_parameters"]
    assert full["classes"]["weights"] == 2 * full16["classes"]["weights"] == 4 * found["parameters"]
    assert full["classes"]["weights"] > lora["classes"]["weights"] > qlora["classes"]["weights"]
    assert full["classes"]["adapters"] == 0 < lora["classes"]["adapters"] == qlora["classes"]["adapters"]
    assert (full["tokens"], dpo["tokens"]) == (64, 2 * (32 + 17))  # what a pair shares is computed once
    assert [row["settings"]["model.storage"] for row in found["rows"]] == ["full", "full16", "bf16", "nf4", "bf16"]


def test_dpo_with_all_weights_asks_the_reference_before(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = as_json(capsys, "method=dpo", "model.storage=full")["rows"]
    assert (row["name"], row["settings"]["adapter.kind"]) == ("Full + DPO", "none")


def test_a_step_is_cut_into_micro_batches_that_hold_less(capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = as_json(capsys, "sequences=4", "model.storage=nf4")["rows"]
    (parts,) = as_json(capsys, "sequences=4", "model.storage=nf4", "run.microbatch_tokens=40")["rows"]
    assert whole["tokens"] == parts["tokens"] == 128
    assert (whole["settings"]["run.microbatch_tokens"], parts["settings"]["run.microbatch_tokens"]) == (128, 32)
    assert parts["classes"]["activations"] < whole["classes"]["activations"] / 2


def test_a_plan_is_told_in_numbers_of_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    (kept,) = as_json(capsys, "run.dtype=fp8")["rows"]
    assert kept["plan"]["qkv"] == {"kept": 2, "host": 0, "again": 0}
    (least,) = as_json(capsys, "run.dtype=fp8", "run.memory=least")["rows"]
    assert least["plan"]["qkv"] == {"kept": 0, "host": 0, "again": 2}
    assert least["plan"]["x"] == {"kept": 2, "host": 0, "again": 0}
    assert least["classes"]["activations"] < kept["classes"]["activations"] / 2
    assert main(instead(TINY, "run.dtype=fp8", "run.memory=least")) == 0
    assert "keeps inputs; computes again q/k/v, attention, MLP inputs, gate/up" in capsys.readouterr().out


def test_the_table_fits_a_terminal_and_names_what_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(instead(TINY, "compare=qlora,sft,dpo")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == "tiny, random weights: 2 layers, 64 wide, 103k parameters"
    assert lines[1].endswith("a step: 1 x 32 tokens, with dpo 1 pair of 32 tokens, half of them shared")
    labels = [line[:15].strip() for line in lines[4:]]
    for label in ("tokens a second", "ms a step", "first step", "peak allocated", *CLASSES, "peak is in"):
        assert labels.count(label) == 1
    assert any(line.startswith("qlora: keeps everything; model.storage=nf4") for line in lines)
    assert lines[-1].startswith("On a CPU the bytes of live tensors are counted")


def test_the_model_that_is_there_is_measured_where_no_shape_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["bench", "run.device=cpu", "run.steps=1", "length=16", "model.storage=nf4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["random"], found["rows"][0]["name"]) == ("embedded", False, "QLoRA")


def test_what_does_not_fit_is_left_out_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare=full,lora,qlora", "run.dtype=fp8", "run.memory=0.63MB"]
    full, lora, qlora = as_json(capsys, *words)["rows"]
    assert "model.storage=full trains them" in full["problem"]
    assert lora["problem"].startswith("run.memory=0.63MB is too little: weights and adapters ")
    assert qlora["peak_bytes"] > 0
    assert main(instead(TINY, *words)) == 0
    out = capsys.readouterr().out
    assert "\nlora: run.memory=0.63MB is too little" in out
    assert next(line for line in out.splitlines() if line.startswith("ms a step")).split()[3:5] == [ABSENT, ABSENT]


def test_memory_that_runs_out_is_told_in_a_line_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = trial.open_model

    def short(start: Any, model: Any, *rest: Any, **more: Any):
        if model.storage == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return opened(start, model, *rest, **more)

    monkeypatch.setattr(trial, "open_model", short)
    full, lora = as_json(capsys, "compare=full,lora", "sequences=2")["rows"]
    assert full["problem"].startswith("out of memory with ")
    needing_less = "sequences=1, length=16, run.memory=least, model.storage=full16, optim.kind=adamw8bit"
    assert full["problem"].endswith(f"in use; less is needed by {needing_less}")
    assert lora["peak_bytes"] > 0
    assert complaint(capsys, *TINY, "compare=full").startswith("burnish bench: full: out of memory with ")


def failing(monkeypatch: pytest.MonkeyPatch, number: int, size: int = 2**25) -> list[int]:
    """This pass with gradients, counted from 1, holds so many bytes when memory runs out; how many passes there were.

    It takes longer than a step besides.
    """
    hidden, count = Decoder.hidden, [0]

    def short(self: Decoder, batch: Any, adapter: str | None = None) -> torch.Tensor:
        if torch.is_grad_enabled():
            count[0] += 1
            if count[0] == number:
                assert torch.empty(size, dtype=torch.uint8).untyped_storage().nbytes() == size
                time.sleep(0.5)
                raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, batch, adapter)

    monkeypatch.setattr(Decoder, "hidden", short)
    return count


@pytest.mark.parametrize(("number", "steps", "passes"), [(2, 1, 6), (4, 1, 7), (5, 2, 9), (6, 2, 8)])
def test_a_shortage_on_the_way_is_no_part_of_what_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, steps: int, passes: int
) -> None:
    """In a step of warm-up, the first or the second of those that are timed, or the one that is explained.

    Those that are timed begin anew, and the one that is explained is taken again.
    """
    count = failing(monkeypatch, number)
    (row,) = as_json(capsys, "sequences=2", f"run.steps={steps}")["rows"]
    assert row["step_seconds"] < 0.4
    assert row["plan"] == {"again": True}  # what was done about it
    assert row["peak_bytes"] < 2**25
    assert sum(row["classes"].values()) == row["peak_bytes"]
    assert count[0] == passes


@pytest.mark.parametrize("where", ["open_model", "open_learner"])
def test_stopped_it_speaks_of_no_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def asked_to_stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, where, asked_to_stop)
    assert main(TINY) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "burnish bench: stopped; nothing is kept of a measurement"


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("method=foo", "'method' is one of sft, dpo, not foo"),
        ("compare=full,foo", "'compare' is one of full, full16, lora, qlora, sft, dpo, not foo"),
        ("compare=full,qlra", "lora, qlora, sft, dpo, not qlra; did you mean 'qlora'?"),
        (
            "run.memory=1MB",
            "run.memory=1MB is too little: the weights alone take 10.0MB; write a larger amount, or run.memory=auto",
        ),
        ("model.shape=lama-65b", "model.shape=lama-65b is not known: did you mean llama-65b?"),
        ("model.shape=bar", "write one of llama-2-7b, llama-3.1-8b, llama-65b, qwen-2.5-0.5b, tiny, or model.path=DIR"),
        ("cap=12", "cap=12 is no amount: write one such as 48GB or 44.5GiB"),
        ("cap=least", "cap=least is no amount: write one such as 48GB or 44.5GiB"),
        ("length=4096", "length=4096: the model in embedded is made for 1024 tokens: write length=1024"),
        ("run.folder=x", "run.folder does nothing in a measurement: leave it out"),
        ("run.steps=0", "run.steps=0 times nothing: write 1 or more, or leave it out"),
        ("run.microbatch_tokens=100", "run.microbatch_tokens=100 is less than the 1024 tokens of one: write 1024"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(capsys: pytest.CaptureFixture[str], word: str, said: str) -> None:
    assert complaint(capsys, "bench", word).endswith(said)


def test_two_models_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "bench", "model.shape=tiny", "model.path=embedded")
    assert said.endswith("model.shape=tiny and model.path=embedded are two models: leave one out")


def test_a_cap_is_for_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert "leave it out on a CPU" in complaint(capsys, *TINY, "cap=12GB")


def test_a_loss_that_is_no_number_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, *TINY, "optim.lr=1e30").endswith("is not finite: lower optim.lr")
