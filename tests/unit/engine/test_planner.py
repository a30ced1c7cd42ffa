"""What is where while a run trains: activations, the optimizer's states, and what becomes of both in a shortage."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.config import build
from burnish.engine import planner, relief
from burnish.engine.assemble import open_learner, open_model
from burnish.engine.budget import LINK_RATE, leanest, make_plan, peak_bytes, seconds_of, sizes_of
from burnish.engine.learner import Learner
from burnish.engine.mesh import Mesh
from burnish.engine.planner import Arranged, Held, Planner, amount_of, arrange, plan_for
from burnish.engine.room import NoRoom, Shortage
from burnish.engine.start import Start
from burnish.losses.likelihood import cross_entropy
from burnish.model.decoder import Decoder
from burnish.model.shapes import SHAPES
from burnish.model.shelf import Plan, keep_everything, keep_inputs
from burnish.optim import adamw
from burnish.optim.adamw import AdamW, optimizer_tensors
from burnish.settings import TrainingSettings, memory_bytes
from burnish.types import Batch
from tests.tiny import tiny_batch
from tests.unit.engine.test_budget import CPU, CUDA, GB, LLAMA_7B, NARROW, PLENTY, recomputed, work

BATCH = tiny_batch([40, 24])


def arranged(
    monkeypatch: pytest.MonkeyPatch, memory: str, free: int, held: Held, margin: int = 0, **changes: object
) -> Arranged:
    """On a CUDA device with so many free bytes and a margin besides, and a host with plenty."""
    monkeypatch.setattr(planner, "free_bytes", lambda device, kept=0.0: free + (0 if kept else margin))
    monkeypatch.setattr(planner, "host_bytes", lambda device: PLENTY)
    return plan_for(sizes_of(LLAMA_7B, work(**changes)), 32, memory, held, CUDA)


def plan_on_gpu(monkeypatch: pytest.MonkeyPatch, memory: str, free: int, held: Held, **changes: object) -> Plan:
    return arranged(monkeypatch, memory, free, held, **changes).plan


def test_auto_takes_what_is_free_and_an_amount_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(now=4 * GB, to_come=GB // 2)
    sizes = sizes_of(LLAMA_7B, work())
    auto = plan_on_gpu(monkeypatch, "auto", 74 * GB, held)
    assert auto.kept == keep_everything(32).kept
    assert auto.dense_blocks == 32
    some = plan_on_gpu(monkeypatch, "24GB", 74 * GB, held)
    assert not recomputed(some, 32)  # what has no room goes to the host, and hides there
    assert any(some.host)
    some = plan_on_gpu(monkeypatch, "16GB", 74 * GB, held)
    assert 11 * GB < peak_bytes(some, sizes) <= 16 * GB - held.now - held.to_come
    assert recomputed(some, 32)
    assert plan_on_gpu(monkeypatch, "70GB", 12 * GB, held) == plan_on_gpu(monkeypatch, "16GB", 74 * GB, held)
    least = plan_on_gpu(monkeypatch, "least", 74 * GB, held)
    assert sum(map(len, least.kept)) == 3  # the last block keeps what others send to the host


def test_too_little_says_what_takes_how_much_and_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(now=4 * GB, to_come=GB // 2)
    with pytest.raises(ValueError, match=r"run\.memory=5GB is too little") as error:
        plan_on_gpu(monkeypatch, "5GB", 74 * GB, held)
    text = str(error.value)
    assert "\n" not in text
    assert "weights and adapters 4.0GB, gradients and optimizer 500.0MB" in text
    found = re.search(r"write run\.memory=(\S+) or a smaller run\.microbatch_tokens$", text)
    assert found is not None
    amount = float(found[1].removesuffix("GB"))
    plan_on_gpu(monkeypatch, found[1], 74 * GB, held)  # what it says to write works, and little less does not
    with pytest.raises(ValueError, match="too little"):
        plan_on_gpu(monkeypatch, f"{amount - 0.15:.2f}GB", 74 * GB, held)


@pytest.mark.parametrize("memory", ["auto", "least", "60GB"])
def test_a_device_that_is_too_small_is_not_told_to_write_an_amount(
    monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    with pytest.raises(ValueError, match=rf"run\.memory={memory}: 4\.9GB of this device can be used") as error:
        plan_on_gpu(monkeypatch, memory, GB - 10**8, Held(4 * GB, GB // 2))
    assert "write a smaller run.microbatch_tokens" in str(error.value)


def test_where_only_the_least_fits_the_margin_is_used_too(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(now=4 * GB, to_come=GB // 2)
    least = arranged(monkeypatch, "least", 74 * GB, held)
    needed = peak_bytes(least.plan, sizes_of(LLAMA_7B, work())) + held.to_come
    for memory in ("least", "auto", "60GB"):
        assert arranged(monkeypatch, memory, needed - GB, held, margin=GB) == least
        with pytest.raises(ValueError, match=rf"run\.memory={memory}: .*too little"):
            arranged(monkeypatch, memory, needed - 2 * GB, held, margin=GB)
    free = needed + 2 * GB
    assert arranged(monkeypatch, "auto", free, held, margin=GB) == arranged(monkeypatch, "auto", free, held)


def test_on_a_cpu_auto_keeps_everything_and_amounts_are_refused_only_below_the_weights() -> None:
    sizes = sizes_of(NARROW, work(256, 64, itemsize=4, storage="full", device="cpu"))
    held = Held(now=10**6, to_come=2 * 10**6)
    assert plan_for(sizes, 4, "auto", held, CPU)[:3] == (keep_everything(4), 0, False)
    assert plan_for(sizes, 4, "least", held, CPU)[:3] == (keep_inputs(4), 0, False)
    assert plan_for(sizes, 4, "1GB", held, CPU)[:3] == (keep_everything(4), 0, False)
    assert plan_for(sizes, 4, "3.1MB", held, CPU)[:3] == (keep_inputs(4), 0, False)
    middle = plan_for(sizes, 4, "6MB", held, CPU).plan
    assert recomputed(middle, 4)
    assert middle != keep_inputs(4)
    with pytest.raises(ValueError, match=r"run\.memory=3MB"):
        plan_for(sizes, 4, "3MB", held, CPU)


def test_states_leave_for_the_host_where_that_costs_less_than_computing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 16 micro-batches pays their crossing once, and for what is computed again 16 times."""
    states = 4 * GB
    held = Held(now=14 * GB, to_come=states, movable=states)
    for memory in ("28GB", "24GB", "20GB"):
        often = arranged(monkeypatch, memory, 74 * GB, held, storage="bf16", a_step=16)
        once = arranged(monkeypatch, memory, 74 * GB, held, storage="bf16", a_step=1)
        assert often.away >= once.away
        for found, a_step in ((often, 16), (once, 1)):
            sizes = sizes_of(LLAMA_7B, work(storage="bf16", a_step=a_step))
            room = int(memory[:-2]) * GB - held.now - held.to_come
            assert peak_bytes(found.plan, sizes) <= room + found.away
            cost = a_step * seconds_of(found.plan, sizes) + 2 * found.away / LINK_RATE
            for away in range(0, states + 1, states // 8):
                other = make_plan(sizes, 32, room + away, PLENTY - away)
                if other is not None:
                    assert cost <= a_step * seconds_of(other, sizes) + 2 * away / LINK_RATE + 1e-12
    assert often.away > 0


def test_with_room_for_all_no_state_leaves_and_at_the_least_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(now=4 * GB, to_come=GB, movable=GB // 2)
    assert arranged(monkeypatch, "auto", 74 * GB, held).away == 0
    assert arranged(monkeypatch, "least", 74 * GB, held).away == GB // 2
    sizes = sizes_of(LLAMA_7B, work())
    limited = arrange(sizes, 32, 74 * GB, GB // 4, GB // 2, fill=False)
    assert limited is not None
    assert limited.away == GB // 4  # as much as the host has room for


def test_gradients_are_taken_as_they_appear_where_that_costs_less_or_nothing_else_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A 7B in bf16, its states on the host: 13.5 GB of weights, as many of gradients."""
    held = Held(now=13 * GB, to_come=14 * GB, passing=13 * GB)
    assert not arranged(monkeypatch, "auto", 74 * GB, held, storage="full16").taken
    assert arranged(monkeypatch, "least", 74 * GB, held, storage="full16").taken
    freely = arranged(monkeypatch, "36GB", 74 * GB, held, storage="full16")
    assert freely.taken  # room for activations, and nothing is computed twice for it
    twice = held._replace(twice=True)
    assert not arranged(monkeypatch, "36GB", 74 * GB, twice, storage="full16").taken
    assert arranged(monkeypatch, "24GB", 74 * GB, twice, storage="full16").taken
    with pytest.raises(ValueError, match=r"optimizer 1\.0GB, gradients of one layer at a time, activations at least"):
        arranged(monkeypatch, "14GB", 74 * GB, twice, storage="full16")


def test_states_leave_before_a_run_is_refused_and_the_message_counts_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    least = peak_bytes(leanest(sizes_of(LLAMA_7B, work()), 32, PLENTY), sizes_of(LLAMA_7B, work()))
    held = Held(now=4 * GB, to_come=6 * GB, movable=5 * GB)
    amount = f"{(5 * GB + least) / GB + 0.001:.3f}GB"
    found = arranged(monkeypatch, amount, 74 * GB, held)
    assert found.away == 5 * GB
    with pytest.raises(ValueError, match=r"run\.memory=5GB is too little") as error:
        arranged(monkeypatch, "5GB", 74 * GB, held)
    assert "gradients and optimizer 1.0GB with its states on the host" in str(error.value)
    there = Held(now=10 * GB, to_come=0, movable=5 * GB)  # of a run that is continued
    with pytest.raises(ValueError, match=r"adapters 5\.0GB, gradients and optimizer 0\.0MB") as error:
        arranged(monkeypatch, "5GB", 74 * GB, there)
    written = re.search(r"write run\.memory=(\S+) or", str(error.value))
    assert written is not None
    assert arranged(monkeypatch, written[1], 74 * GB, there).away == 5 * GB


def test_states_that_will_be_on_the_host_in_any_case_leave_less_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(now=4 * GB, to_come=GB)
    assert any(arranged(monkeypatch, "least", 74 * GB, held).plan.host)
    assert not any(arranged(monkeypatch, "least", 74 * GB, held._replace(lent=PLENTY)).plan.host)
    with pytest.raises(ValueError, match=r"gradients and optimizer 1\.0GB with its states on the host"):
        arranged(monkeypatch, "5GB", 74 * GB, held._replace(lent=GB))


def test_amounts_are_written_as_they_are_read_and_never_less() -> None:
    for size in (0, 1, 99_999, 630_000, 999_900_000, 999_900_001, 10**9, 24_123_456_789):
        text = amount_of(size)
        written = float(text[:-2]) * {"GB": 10**9, "MB": 10**6}[text[-2:]]
        assert size <= written < size + (10**8 if size >= 10**9 else 10**5)
        assert not size or memory_bytes(text) == pytest.approx(written, abs=1)
    assert [amount_of(size) for size in (500_000_000, 999_900_001, 4 * 10**9)] == ["500.0MB", "1.0GB", "4.0GB"]


Opened = tuple[Decoder, str | None, Learner]


def opened(folder: Path, kind: str = "lora", by_hand: bool = True, **run: Any) -> Opened:
    """A tiny model and its learner, whose states are in 8 bits. On a CPU only 8-bit matmuls are run by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    groups = {
        "model": {"path": str(folder), "init": "random", "storage": "nf4" if by_hand else "bf16"},
        "adapter": {"kind": kind, "rank": 16},
        "run": {"device": "cpu", "microbatch_tokens": 64, "step_tokens": 64} | run,
        "optim": {"lr": 0.01, "warmup": 0, "kind": "adamw8bit"},
    }
    groups["run"] |= {"dtype": "fp8"} if by_hand else {}
    settings, mesh = build(TrainingSettings, groups), Mesh(CPU)
    decoder, name = open_model(Start(folder), settings.model, settings.adapter, settings.run, mesh)
    return decoder, name, open_learner(decoder, name, settings.optim, 10, mesh)


def step(run: Opened, fails: int = 0) -> dict[str, float]:
    """A step whose first attempts run out of memory, in their backward pass."""
    decoder, name, learner = run
    attempts = [0]

    def objective(batch: Batch):
        scores = decoder.score(batch, name)
        attempts[0] += 1
        if attempts[0] <= fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cross_entropy(scores.log_probs, batch.weights, scores.correct)

    return learner.step([BATCH], objective, lambda batch: batch.total_weight)


class Paged(AdamW):
    """With small pages."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given, page=2**14)


@pytest.fixture
def paging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages, and a host beside the device, which both are this machine."""
    for module in (planner, relief):
        monkeypatch.setattr(module, "has_host", lambda device: True)
    monkeypatch.setattr(adamw, "AdamW", Paged)
    monkeypatch.setattr(planner, "host_bytes", lambda device: PLENTY)


def results(run: Opened, steps: list[int]) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    found = [step(run, fails) for fails in steps]
    parameters = run[2].parameters
    return found, {name: p.detach().clone() for name, p in parameters.items()} | optimizer_tensors(
        run[2].optimizer, parameters
    )


def assert_same(found: Any, wanted: Any) -> None:
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    for name, tensor in wanted[1].items():
        assert torch.equal(found[1][name], tensor), name


@pytest.mark.usefixtures("paging")
def test_room_is_made_step_by_step_and_changes_no_bit(tmp_path: Path) -> None:
    """Of a run whose blocks are run by hand: a smaller plan again and again, then states, and only then halves."""
    wanted = results(opened(tmp_path), [0] * 4)
    run = opened(tmp_path)
    told: list[Shortage] = []
    run[2].room.told = told.append
    plans = [run[0].plan]
    found = results(run, [0])
    for _ in range(2):
        more = results(run, [1])
        found = [*found[0], *more[0]], more[1]
        plans.append(run[0].plan)
    assert [shortage.limit for shortage in told] == [None, None]
    assert "computed again" in told[0].made
    sizes = sizes_of(run[0].config, work(64, 64, storage="nf4", fp8=True, itemsize=4, device="cpu"))
    peaks = [peak_bytes(plan, sizes) for plan in plans]
    assert peaks == sorted(set(peaks), reverse=True)
    more = results(run, [0])
    assert_same(([*found[0], *more[0]], more[1]), wanted)
    told.clear()
    with pytest.raises(NoRoom):
        step(run, 10**9)
    made = [shortage.made for shortage in told if shortage.made]
    assert "states wait on the host" in made[-1]
    assert [shortage.limit for shortage in told] == [*[None] * len(made), 32]
    assert isinstance(run[2].optimizer, AdamW)
    assert run[2].optimizer.movable() == 0


@pytest.mark.usefixtures("paging")
def test_evicted_states_come_back_and_wait_longer_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relief, "PATIENCE", 2)
    run = opened(tmp_path, by_hand=False, memory="least")  # blocks are computed again already
    wanted = results(opened(tmp_path, by_hand=False, memory="least"), [0] * 9)
    optimizer = run[2].optimizer
    assert isinstance(optimizer, AdamW)
    away: list[int] = []
    found: list[dict[str, float]] = []
    last: dict[str, Tensor] = {}
    for fails in (0, 1, 0, 0, 1, 0, 0, 0, 0):
        metrics, last = results(run, [fails])
        found += metrics
        away.append(optimizer.away())
    assert_same((found, last), wanted)
    assert [size > 0 for size in away] == [False, True, False, False, True, True, True, False, False]
    monkeypatch.setattr(planner, "free_bytes", lambda device, margin=0.0: 0)
    monkeypatch.setattr(relief, "free_bytes", lambda device, margin=0.0: 0)
    for fails in (1, *[0] * 20):
        step(run, fails)
    assert optimizer.away() > 0  # there was no room


@pytest.mark.usefixtures("paging")
def test_at_the_least_memory_states_are_on_the_host_from_the_start_and_from_a_resume_on(tmp_path: Path) -> None:
    ordinary, run = opened(tmp_path), opened(tmp_path, memory="least")
    unpaged, optimizer = ordinary[2].optimizer, run[2].optimizer
    assert isinstance(unpaged, AdamW)
    assert isinstance(optimizer, AdamW)
    whole = unpaged.to_come()
    assert unpaged.movable() > whole // 2
    assert optimizer.movable() == 0
    wanted, found = results(ordinary, [0] * 3), results(run, [0] * 3)
    assert_same(found, wanted)
    assert optimizer.held() + optimizer.movable() + optimizer.to_come() < whole // 2
    assert optimizer.away() > whole // 2
    again = opened(tmp_path, memory="least")
    planned = again[0].planner
    assert isinstance(planned, Planner)
    other = again[2].optimizer
    assert isinstance(other, AdamW)
    adamw.restore_optimizer(other, again[2].parameters, found[1])
    assert other.held() < whole // 2  # though nothing is planned yet
    assert other.away() > whole // 2
    assert planned.held().to_come == sum(p.nbytes for p in again[2].parameters.values()) + other.to_come()
    assert other.to_come() == 0
    step(again)
    assert other.away() > whole // 2


@pytest.mark.usefixtures("paging")
def test_states_that_an_amount_does_not_hold_beside_the_weights_are_on_the_host_before_a_resume_reads_them(
    tmp_path: Path,
) -> None:
    ordinary = opened(tmp_path)
    weights, unpaged = sum(p.nbytes for p in ordinary[0].parameters()), ordinary[2].optimizer
    assert isinstance(unpaged, AdamW)
    whole = unpaged.to_come()
    first = {name: tensor.clone() for name, tensor in results(ordinary, [0])[1].items()}
    wanted = results(ordinary, [0] * 2)
    for share, away in ((1.5, False), (0.5, True)):
        amount = weights + round(share * whole)
        run = opened(tmp_path, memory=f"{amount / 1e6:.6f}MB")
        planned, optimizer = run[0].planner, run[2].optimizer
        assert isinstance(planned, Planner)
        assert isinstance(optimizer, AdamW)
        assert (optimizer.to_lend() > 0) == (planned.held().lent > 0) == away
        adamw.restore_optimizer(optimizer, run[2].parameters, first)
        assert weights + optimizer.held() <= amount  # though nothing is planned yet
        assert weights + optimizer.held() > amount - 3 * 2**14 or not away  # and no more has left than must
        assert (optimizer.away() > 0) == away
        assert (optimizer.to_come(), planned.held().lent) == (0, 0)
        with torch.no_grad():
            for name, parameter in run[2].parameters.items():
                parameter.copy_(first[name])
        run[0].planner, run[2].steps_taken = None, 1  # the amount holds no step: it is about what comes before
        assert_same(results(run, [0] * 2), wanted)


@pytest.mark.usefixtures("paging")
def test_of_several_optimizers_no_more_states_leave_than_must(tmp_path: Path) -> None:
    decoder, _, learner = opened(tmp_path)
    planned, groups = decoder.planner, [{"params": list(learner.parameters.values())}]
    assert isinstance(planned, Planner)
    several = [adamw.AdamW(groups, 0.1, (0.9, 0.99), 1e-8, True, 0) for _ in range(2)]
    planned.optimizers, whole = several, several[0].to_come()
    beyond = whole // 4
    amount = planned.held().now + 2 * whole - beyond
    planned.run = planned.run.model_copy(update={"memory": f"{amount / 1e6:.6f}MB"})
    movable = sum(optimizer.movable() for optimizer in several)
    planned.begin()
    gone = movable - sum(optimizer.movable() for optimizer in several)
    assert beyond <= gone < beyond + 2**15
    assert several[1].to_lend() == 0


def test_states_are_not_paged_where_the_host_is_the_device(tmp_path: Path) -> None:
    run = opened(tmp_path, memory="least")
    told: list[Shortage] = []
    run[2].room.told = told.append
    step(run)
    with pytest.raises(NoRoom):
        step(run, 10**9)
    assert not any("states" in shortage.made for shortage in told)
    assert isinstance(run[2].optimizer, AdamW)
    assert run[2].optimizer.away() == 0


def test_blocks_that_are_not_run_by_hand_are_computed_again(tmp_path: Path) -> None:
    wanted = results(opened(tmp_path, "dora", by_hand=False), [0] * 3)
    run = opened(tmp_path, "dora", by_hand=False)
    told: list[Shortage] = []
    run[2].room.told = told.append
    assert_same(results(run, [0, 1, 0]), wanted)
    assert run[0].checkpointing
    assert [shortage.limit for shortage in told] == [None]
    step(run, 1)
    assert told[-1].limit == 32


def test_decoded_weights_go_first(tmp_path: Path) -> None:
    run = opened(tmp_path)
    decoder = run[0]
    step(run)
    blocks = len(decoder.config.layers)
    decoder.follow(Plan(decoder.plan.kept, decoder.plan.host, dense_blocks=blocks))
    step(run)
    assert decoder.fused is not None
    joints = [joint for part in decoder.fused.trunk.parts for joint in (part.qkv, part.o, part.gate_up, part.down)]
    held = [sum(tensor.nbytes for tensor in joint.held) for joint in joints]
    told: list[Shortage] = []
    run[2].room.told = told.append
    step(run, 1)
    assert "decoded" in told[0].made
    assert decoder.plan.dense_blocks == 0
    assert decoder.plan.kept == keep_everything(blocks).kept
    assert sum(sum(tensor.nbytes for tensor in joint.held) for joint in joints) < sum(held) / 10


@pytest.mark.usefixtures("paging")
def test_a_smaller_plan_leaves_the_host_what_states_are_still_to_take_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tmp_path, memory="least")
    planned = run[0].planner
    assert isinstance(planned, Planner)
    run[0].plan = keep_everything(len(run[0].config.layers))
    lent = planned.held().lent
    assert lent > 0
    rooms = list[int]()

    def asked(sizes, num_blocks, room, host_room) -> Plan | None:
        rooms.append(host_room)
        return make_plan(sizes, num_blocks, room, host_room)

    monkeypatch.setattr(planner, "make_plan", asked)
    for host in (lent // 2, lent, lent + 7):
        monkeypatch.setattr(planner, "host_bytes", lambda device, found=host: found)
        assert planned.smaller() is not None
    assert rooms == [0, 0, 7]
