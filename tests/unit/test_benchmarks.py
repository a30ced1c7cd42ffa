"""What the benchmarks can be asked for, that the work is what they say, and that a comparison survives its systems."""

import itertools
import json
import runpy
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import checkpoints, dpo, memory, ppo, sampler, sft
from benchmarks.contest import Entry, contest, open_peer, peers_missing, row_of
from benchmarks.meter import Meter
from benchmarks.models import ALPHA, RANK
from benchmarks.peers import dpo as peer_dpo
from benchmarks.peers import fetch, varlen
from benchmarks.peers import ppo as peer_ppo
from benchmarks.peers import sft as peer_sft
from benchmarks.rows import read_words as read
from benchmarks.shapes import SHAPES
from benchmarks.turns import Clock, Failed, Worker
from benchmarks.workload import lengths_of, rows_of, sides_at_once, turn_of
from burnish.data.chat import end_ids
from burnish.data.comparing import collate_comparisons
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.mesh import Mesh
from burnish.model.checkpoint import load_model

SYSTEM = """
import os, sys
from benchmarks.turns import listen, say
print("libraries print what they like", end="")
say({"versions": "one 1.0"})
while (request := listen()) is not None:
    if "fail" in request:
        print("ValueError: it does not fit", file=sys.stderr)
        sys.exit(3)
    say({"seconds": [request["seconds"]] * 3, "first": 1.0, "allocated": 2.0, "reserved": 3.0, "pid": os.getpid()})
"""


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("storag=bf16", r"^storag=bf16 is not known: did you mean storage=\.\.\.\?$"),
        ("storage", r"^storage is not known: did you mean storage=\.\.\.\?$"),
        ("zzz=3", "^zzz=3 is not known: known are row, shape, storage, lengths, sequences, length, "),
        ("storage=nf5", "^storage=nf5 is not known: write one of nf4, bf16, full16, full$"),
        ("row=qlorra", "^row=qlorra is not known: write one of qlora, qlora-8b, lora, ragged, full, small$"),
        (
            "shape=llama",
            "^shape=llama is not known: write one of llama-2-7b, llama-3.1-8b, llama-65b, qwen-2.5-0.5b, tiny$",
        ),
        ("sides=fast,slow", "^sides=fast,slow is not known: write one or more of fast,lean$"),
        ("memory=24", "^run.memory=24 is no amount: write auto, least, or an amount such as 24GB or 22.5GiB$"),
        ("length=-1", "^length=-1 must be a whole number above 0$"),
        ("rounds=2", "^'rounds' is given twice: leave one out$"),
        ("sequences=0", "^sequences=0 must be a whole number above 0$"),
    ],
)
def test_a_word_that_is_not_known_is_named_with_the_nearest(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sft.read_words(["rounds=2", word])


@pytest.mark.parametrize("script", [dpo, memory, ppo, sampler, sft])
def test_nothing_but_a_trial_is_begun_on_a_cpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"it measures on a CUDA device, and there is none; shape=tiny tries it out"):
        script.main(script.WORDS)


@pytest.mark.parametrize("word", ["sides=fats", "sides=fast,", "systems=unslot"])
def test_an_item_of_a_list_that_is_not_known_is_named(word: str) -> None:
    with pytest.raises(ValueError, match=rf"^{word} is not known: write one or more of "):
        read([word], dpo.WORDS, dpo.CHOICES, dpo.NUMBERS, dpo.LISTS)


def test_words_are_read_and_the_others_have_their_defaults() -> None:
    asked = sft.read_words(["storage=bf16", "length=512", "note=a=b c"])
    assert asked == sft.WORDS | {"storage": "bf16", "length": "512", "note": "a=b c"}
    assert sft.read_words([]) == sft.WORDS


def entry(worker: str, **request: object) -> Entry:
    return Entry(f"{worker} {request}", worker, request, {"benchmark": "dpo"})


def words_of(tmp_path: Path, source: str = SYSTEM) -> tuple[list[str], Path, dict[str, str], Path]:
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return [sys.executable, "-c", source], tmp_path / "log.txt", env, tmp_path / "scratch"


def open_system(tmp_path: Path, source: str = SYSTEM) -> Worker:
    return Worker(*words_of(tmp_path, source))


@pytest.mark.parametrize("together", [True, False])
def test_systems_take_turns_and_one_that_breaks_leaves_the_others(tmp_path: Path, capsys, together: bool) -> None:
    entries = [entry("a", seconds=0.5), entry("a", seconds=0.25), entry("b", fail=True), entry("c", seconds=2.0)]
    contest(entries, lambda name: open_system(tmp_path / name), 2, Clock(60), together)
    readings = [[reading["seconds"][0] for reading in entry.readings] for entry in entries]
    assert readings == [[0.5, 0.5], [0.25, 0.25], [], [2.0, 2.0]]
    processes = {reading["pid"] for entry in entries[:2] for reading in entry.readings}
    assert len(processes) == (1 if together else 2)
    said = capsys.readouterr().out
    failed = "b is left out from here on: it ended with exit status 3; its last words: ValueError: it does not fit"
    assert said.count("b is left out") == (1 if together else 2)
    assert failed in said
    assert "libraries print" in (tmp_path / "a" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("together", "events"),
    [
        (True, ["open a", "open b", "ask a", "ask b", "ask a", "close a", "ask b", "close b"]),
        (False, [f"{event} {name}" for name in "abab" for event in ("open", "ask", "close")]),
    ],
)
def test_a_process_ends_with_its_last_turn(tmp_path: Path, together: bool, events: list[str]) -> None:
    seen: list[str] = []

    class Noted(Worker):
        def __init__(self, name: str) -> None:
            self.name = name
            seen.append(f"open {name}")
            super().__init__(*words_of(tmp_path / name))

        def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
            seen.append(f"ask {self.name}")
            return super().ask(request, seconds)

        def close(self) -> None:
            seen.append(f"close {self.name}")
            super().close()

    contest([entry("a", seconds=0.5), entry("b", seconds=0.5)], Noted, 2, Clock(60), together)
    assert seen == events


def test_a_system_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    worker = open_system(tmp_path, "import sys; print('working', flush=True); sys.stdin.read()")
    with pytest.raises(Failed, match=r"^said nothing for 1 s; its last words: working$"):
        worker.hear(1.0)


def test_no_turn_is_begun_that_the_clock_leaves_no_time_for(tmp_path: Path, capsys) -> None:
    class Spent(Clock):
        """The first turn takes 40 of 60 seconds."""

        def __init__(self) -> None:
            self.times = iter([60.0, 60.0, 60.0, 60.0, 20.0, 20.0])

        def left(self) -> float:
            return next(self.times)

    entries = [entry("a", seconds=0.5)]
    contest(entries, lambda name: open_system(tmp_path), 2, Spent(), together=True)
    assert len(entries[0].readings) == 1
    assert "a has no turn: 20 s are left, and one took 40 s" in capsys.readouterr().out


def test_a_row_holds_medians_over_the_rounds_and_the_highest_peaks() -> None:
    found = entry("a")
    found.readings = [
        {"seconds": [0.5, 0.5, 9.0], "first": 7.0, "allocated": 5.0, "reserved": 6.0},
        {"seconds": [0.5, 0.4, 0.4], "first": 1.0, "allocated": 5.5, "reserved": 5.75},
    ]
    found.about = {"versions": "one 1.0"}
    assert row_of(found, samples=2, tokens=4096) == {
        "benchmark": "dpo",
        "tokens_per_step": 4096,
        "step_seconds": "0.5000",
        "tokens_per_second": "8192",
        "peak_allocated_gib": "5.50",
        "peak_reserved_gib": "6.00",
        "compile_seconds": "7.0",
        "samples_per_second": "4.000",
        "note": "rounds 4.000 5.000",
        "versions": "one 1.0",
    }


def test_ragged_steps_are_counted_token_by_token() -> None:
    found = entry("a")
    found.readings = [
        {"seconds": [0.5, 1.5], "tokens": [100, 500], "first": 7.0, "allocated": 5.0, "reserved": 6.0},
        {"seconds": [1.0, 1.0], "tokens": [300, 300], "first": 1.0, "allocated": 5.0, "reserved": 6.0},
    ]
    row = row_of(found)
    assert (row["tokens_per_step"], row["step_seconds"], row["tokens_per_second"]) == (300, "1.0000", "300")
    assert (row["note"], row["samples_per_second"]) == ("rounds 300.000 300.000", "")
    found.readings[0]["tokens"] = [300, 300]  # of one length: the median of 0.5, 1, 1 and 1.5 seconds
    assert row_of(found)["step_seconds"] == "1.0000"


def test_a_meter_counts_no_warm_up() -> None:
    meter = Meter(2, 3, torch.device("cpu"))
    for _ in range(2):
        assert meter.fresh
        ends = []
        for _ in range(5):
            meter.begin()
            ends.append(meter.end())
        assert ends == [False, False, False, False, True]
        assert len(meter.reading()["seconds"]) == 3


def test_pairs_have_the_tokens_that_peers_are_given() -> None:
    comparisons = dpo.random_comparisons(3, 16, 8, 320, seed=0)
    whole = collate_comparisons(comparisons, share_prefix=False)
    assert (whole.num_sequences, len(whole.tokens), whole.num_pairs) == (6, 6 * 24, 3.0)
    assert whole.total_weight == 6 * 8
    shared = collate_comparisons(comparisons, share_prefix=True)
    assert len(shared.tokens) == 3 * (16 + 2 * 8 + 1)  # the last prompt token stays each answer's own
    assert (shared.total_weight, shared.num_pairs) == (whole.total_weight, whole.num_pairs)
    asked = read([], dpo.WORDS, dpo.CHOICES, dpo.NUMBERS)
    given = peer_dpo.read_arguments(dpo.peer_words(asked, dpo.PEERS[-1], Path("model")))
    assert (given.pairs, given.prompt, given.answer) == (2, 512, 512)
    assert (given.system, given.checkpointing, given.cached, given.fused) == ("unsloth", 0, 1, 1)
    assert (given.turns, given.warm_up, given.timed) == (2, dpo.WARM_UP, dpo.TIMED)


def test_sides_of_dpo_are_measured_together_or_apart() -> None:
    def names(sides: str) -> list[str]:
        asked = read([f"sides={sides}", "systems=unsloth"], dpo.WORDS, dpo.CHOICES, dpo.NUMBERS)
        return [entry.name for entry in [*dpo.ours(asked), *dpo.theirs(asked)]]

    fast, lean = names("fast"), names("lean")
    assert sorted(names("fast,lean")) == sorted(fast + lean)
    assert [name.split(",")[0] for name in lean] == ["burnish", "unsloth"]
    assert len(fast) == len(dpo.OURS) - 1 + 3
    assert all("memory=least" not in name and "checkpointing=true" not in name for name in fast)


@pytest.mark.parametrize("row", sft.ROWS)
def test_every_row_of_the_table_can_be_measured(row: str) -> None:
    asked = sft.read_words([f"row={row}", "shape=tiny", "sequences=2", "length=48", "fp8=false"])
    sides = sft.sides_of(asked)
    found = [one for side in sides for one in sft.ours(asked, side)]
    assert [one.request["memory"] for one in found] == [
        memory for side in sides for memory in (asked["lean"].split(",") if side == "lean" else ["auto"])
    ]
    reading = sft.measured(asked, found[-1].request, Mesh(torch.device("cpu")))
    warm_up, timed = turn_of(2 * 48)
    assert (warm_up, timed) == (16, 40)
    assert len(reading["seconds"]) == len(reading["tokens"]) == timed
    full = {2 * 48} if row != "ragged" else set(range(80, 97))
    assert set(reading["tokens"]) <= full
    assert len(set(reading["tokens"])) > 1 or row != "ragged"


@pytest.mark.parametrize("row", sft.ROWS)
def test_peers_are_told_to_do_the_same_work(row: str) -> None:
    asked = sft.read_words([f"row={row}", "rounds=3"])
    entries = [one for side in sft.sides_of(asked) for one in sft.theirs(asked, side)]
    assert {one.columns["system"] for one in entries} == set(asked["systems"].split(",")) - {"burnish"}
    for one in entries:
        told = sft.peer_request(asked, one.request, Path("model"))
        assert json.loads(json.dumps(told)) == told
        assert (told["shape"], told["storage"], told["turns"]) == (asked["shape"], asked["storage"], 3)
        assert (told["rank"], told["alpha"], told["length"]) == (RANK, ALPHA, 2048)
        assert told["packing"] or told["lengths"] == "fixed" or told["batch"] in ("default", 8)
        given = peer_sft.settings_of(SimpleNamespace(**told), on_card=True)
        if told["batch"] != "default":
            assert (given["per_device_train_batch_size"], given["optim"]) == (told["batch"], told["optimizer"])
            assert ("use_liger_kernel" in given) == (told["system"] == "trl")
    names = [one.worker for side in sft.sides_of(asked) for one in (*sft.ours(asked, side), *sft.theirs(asked, side))]
    assert len(set(names)) == len(names)


def test_ragged_lengths_are_those_of_alpaca_and_the_same_for_all() -> None:
    lengths = lengths_of({"lengths": "alpaca", "length": "2048"}, 4096)
    assert statistics.mean(lengths) == pytest.approx(270, rel=0.05)
    assert min(lengths) >= 16
    assert 1200 < max(lengths) <= 2048
    asked = {"shape": "tiny", "lengths": "alpaca", "length": "128"}
    assert rows_of(asked, 8) == rows_of(asked, 64)
    assert max(map(len, rows_of(asked, 8))) == 128


def test_sides_run_at_once_where_the_device_holds_them() -> None:
    def chosen(row: str, peers: int, gib: float) -> int:
        return len(sides_at_once(sft.read_words([f"row={row}"]), ["fast", "lean"], peers, gib))

    assert (chosen("qlora", 4, 79.1), chosen("qlora", 4, 40.0), chosen("lora", 2, 79.1)) == (1, 2, 2)
    assert chosen("lora", 2, 139.0) == 1


def test_the_small_shape_is_that_of_qwen() -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES["qwen-2.5-0.5b"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 494_032_768  # as the hub says of it


def test_attention_of_packed_rows_is_that_of_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel replaced by its definition: what is checked is where rows start, and how heads are laid out."""
    import torch.nn.attention.varlen as kernels
    from transformers import AutoModelForCausalLM, LlamaConfig

    def alone(q, k, v, starts, key_starts, longest, key_longest, scale, window_size):
        assert (starts.tolist(), longest, window_size) == ([0, 5, 6, 16], 10, (-1, 0))
        rows = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in itertools.pairwise(starts.tolist())]
        found = [torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True, scale=scale) for row in rows]
        return torch.cat(found, 1).transpose(0, 1)

    monkeypatch.setattr(kernels, "varlen_attn", alone)
    varlen.register()
    ids = torch.randint(4, 320, (1, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(5), 0, *range(10)]])
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES["tiny"]), attn_implementation="sdpa").eval()
    with torch.no_grad():
        masked = model(ids, position_ids=positions, use_cache=False).logits
        model.set_attn_implementation(varlen.NAME)
        packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", dpo.OURS, ids=str)
def test_every_setting_of_dpo_can_be_measured(setting: dict[str, object], capsys) -> None:
    mesh, meter = Mesh(torch.device("cpu")), Meter(1, 2, torch.device("cpu"))
    asked = read(["shape=tiny"], dpo.WORDS, dpo.CHOICES, dpo.NUMBERS)
    learner, policy = dpo.open_policy(asked, setting, 128, mesh)
    units = [dpo.random_comparisons(2, 16, 8, SHAPES["tiny"]["vocab_size"], seed) for seed in range(2)]
    batches = [collate_comparisons(pairs, bool(setting["prefix_sharing"])) for pairs in units]
    dpo.steps(learner, policy, batches, setting["reference"] == "cached", meter)
    assert len(meter.reading()["seconds"]) == 2
    assert learner.steps_taken == 3
    loss = float(capsys.readouterr().out.split()[-1])
    assert loss == pytest.approx(0.6931, abs=0.01)  # log 2 at the start, and a rate too small to leave it


def test_peers_that_are_not_there_are_left_out_with_the_reason(tmp_path: Path) -> None:
    assert peers_missing("") == "write peers=DIR of what benchmarks/peers/fetch.py makes"
    reason = peers_missing(str(tmp_path), "trl112")
    assert reason == f"{tmp_path}/trl112/trl is not there: it is made by benchmarks/peers/fetch.py"
    (tmp_path / "site" / "trl").mkdir(parents=True)
    assert peers_missing(str(tmp_path)) is None


def test_an_environment_of_the_peers_is_used_with_its_own_python(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert peers_missing(str(tmp_path)) is None
    assert peers_missing(str(tmp_path), "trl112") is not None  # that one is a folder of its own
    words = ["timeit", "-n", "1", "-r", "1", "import sys, benchmarks.turns as t; t.say({'python': sys.executable})"]
    worker = open_peer(words, tmp_path, ["site"], tmp_path / "log.txt", tmp_path / "scratch")
    assert worker.hear(30) == {"python": str(tmp_path / "bin" / "python")}
    worker.close()


def test_each_library_of_the_peers_has_one_version() -> None:
    lines = [line for path in (fetch.WHEELS, fetch.DEVICE) for line in path.read_text().splitlines()]
    names = [line.partition("==")[0] for line in lines if line and not line.startswith("#")]
    assert len(set(names)) == len(names) > 40


def test_what_a_cuda_13_machine_does_not_read_is_left_out() -> None:
    assert fetch.is_read("bitsandbytes/libbitsandbytes_cuda130.so")
    assert not fetch.is_read("bitsandbytes/libbitsandbytes_cuda129.so")
    assert not fetch.is_read("studio/frontend/dist/index.html")
    assert fetch.is_read("unsloth/models/llama.py")
    assert fetch.is_read("unsloth-2026.10.9.dist-info/RECORD")  # transformers finds packages by it


def test_trl_is_asked_for_the_same_answers() -> None:
    asked = read(["shape=tiny", "prompts=4", "prompt=16", "answer=8"], ppo.WORDS, ppo.CHOICES, ppo.NUMBERS)
    given = peer_ppo.read_arguments(ppo.peer_words(asked, Path("model")))
    assert (given.prompts, given.prompt, given.answer, given.small) == (4, 16, 8, "tiny")
    assert (given.micro, given.warm_up, given.timed) == (4, ppo.WARM_UP, ppo.TIMED)


def test_tiny_has_positions_for_what_is_asked_for_where_nothing_else_is() -> None:
    positions = int(SHAPES["tiny"]["max_position_embeddings"])
    for words in (ppo.WORDS, sampler.WORDS, dpo.WORDS):
        assert int(words["prompt"]) + int(words["answer"]) <= positions
    assert int(sft.WORDS["length"]) <= positions


@pytest.mark.parametrize("storage", ["nf4", "bf16"])
def test_the_recipe_of_ppo_can_be_measured(tmp_path: Path, capsys, storage: str) -> None:
    words = ["shape=tiny", "prompts=3", "prompt=16", "answer=8"]
    asked = read(words, ppo.WORDS, ppo.CHOICES, ppo.NUMBERS)
    checkpoints.main("tiny", tmp_path)
    ppo.write_prompts(tmp_path / "prompts.jsonl", asked)
    reading = ppo.measured(asked, tmp_path, {**ppo.WAYS[-1], "storage": storage})
    assert len(reading["seconds"]) == ppo.TIMED
    assert all(seconds > 0 for seconds in reading["phases"].values())
    assert sum(reading["phases"].values()) <= sum(reading["seconds"])
    # Without an end token every answer has the length that was asked for.
    assert capsys.readouterr().out.count("ended 0%") == ppo.WARM_UP + ppo.TIMED


@pytest.mark.parametrize("words", [[], ["tiny"], ["tyni", "folder"], ["tiny", "folder", "more"]], ids=" ".join)
def test_checkpoints_say_what_they_are_asked_for(monkeypatch: pytest.MonkeyPatch, capsys, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(checkpoints.__file__, run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m benchmarks.checkpoints SHAPE FOLDER\n")


def test_the_checkpoints_are_those_of_other_libraries(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoints.main("tiny", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ended")
    assert tokenizer("w4 w319</s>")["input_ids"] == [4, 319, 2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ended")
    assert (model.dtype, model.config.vocab_size, model.generation_config.eos_token_id) == (torch.bfloat16, 320, 2)
    ours = load_model(tmp_path / "endless", "bf16", torch.device("cpu"), torch.bfloat16)
    assert torch.equal(model.model.embed_tokens.weight, ours.model.embed_tokens.weight)
    folder = Tokenizer.load(tmp_path / "endless")
    assert end_ids(folder, ChatTemplate.open("auto", folder)) == frozenset()


def test_a_reading_divides_updates_into_phases() -> None:
    def step(end: float, rollout: float) -> dict[str, float]:
        seconds = {"rollout": rollout, "scoring": 0.25, "observing": 0.25, "update": 0.5}
        return {"seconds": end, **{f"{name}_seconds": value for name, value in seconds.items()}}

    steps = [step(9.0, 8.0), step(11.0, 1.0), {"eval_loss": 1.0}, step(13.5, 1.5)]
    reading = ppo.reading_of(steps, {"peak_memory_bytes": 2**31})
    assert (reading["seconds"], reading["first"], reading["allocated"]) == ([2.0, 2.5], 9.0, 2.0)
    assert ppo.shares([reading]) == "rollout=56% scoring=11% observing=11% update=22%"
