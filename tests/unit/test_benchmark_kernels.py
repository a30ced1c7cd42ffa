"""Which kernels are measured and which rows they leave, without a device: what takes time is replaced."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks import attended, compare, kernels, meter
from benchmarks.timing import Reading
from burnish.ops.rope import Heads

CPU = torch.device("cpu")
FIRST, BLOCKS, CUDNN = attended.WAYS
TITLE = "attention 2 in 8, 4 heads on 2 of 8"
BACK = TITLE.replace("attention", "attention backward")
TIMES = {f"{TITLE}, {FIRST}": 2.0, f"{BACK}, {FIRST}": 6.0, f"{TITLE}, {BLOCKS}": 1.0, f"{BACK}, {BLOCKS}": 2.0}


class Device(NamedTuple):
    """What calls take on a device that is none."""

    times: dict[str, float | None]
    """By name; None: the call fails."""
    timed: list[str]
    """What was timed so far."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device({**TIMES}, [])

    def attempt(name: str, call: object, calls: int) -> float | None:
        assert calls == attended.CALLS
        device.timed.append(name)
        return device.times[name]

    def forward(q: object, k: object, v: object, way: str, scale: float) -> tuple[None, None]:
        if device.times[f"{TITLE}, {way}"] is None:
            raise RuntimeError("the kernel does not run")
        return None, None

    monkeypatch.setattr(attended, "CASES", [(attended.Attended("2 in 8", [5, 3]), Heads(4, 2, 8))])
    monkeypatch.setattr(attended, "layouts_of", lambda *_: {way: way for way in (FIRST, BLOCKS)})
    monkeypatch.setattr(attended, "attempt", attempt)
    monkeypatch.setattr(attended, "attention_forward", forward)
    return device


def shares(only: str) -> dict[str, str]:
    return {one.name: one.share for one in attended.attention_readings(CPU, only)}


def test_attention_is_held_against_the_first_way(fake: Device) -> None:
    *_, last = readings = [*attended.attention_readings(CPU, "")]
    assert [one.name for one in readings] == [*TIMES]
    assert [one.share for one in readings] == [f"{share} of {FIRST}" for share in ("1.000", "1.000", "2.000", "3.000")]
    scores = 4 * (5 * 6 // 2 + 3 * 4 // 2)
    assert (last.seconds, last.rate) == (2.0, f"{5 * 2 * 8 * scores / 2 / 1e12:.0f} TFLOP/s")


@pytest.mark.parametrize(
    ("failing", "left"),
    [
        (f"{TITLE}, {FIRST}", {f"{TITLE}, {BLOCKS}": "", f"{BACK}, {BLOCKS}": ""}),
        (
            f"{BACK}, {FIRST}",
            {
                f"{TITLE}, {FIRST}": f"1.000 of {FIRST}",
                f"{TITLE}, {BLOCKS}": f"2.000 of {FIRST}",
                f"{BACK}, {BLOCKS}": "",
            },
        ),
        (f"{TITLE}, {BLOCKS}", {f"{TITLE}, {FIRST}": f"1.000 of {FIRST}", f"{BACK}, {FIRST}": f"1.000 of {FIRST}"}),
    ],
)
def test_what_fails_is_no_yardstick_and_ends_nothing(fake: Device, failing: str, left: dict[str, str]) -> None:
    fake.times[failing] = None
    assert shares("") == left


@pytest.mark.parametrize(
    ("only", "left", "timed"),
    [
        (f"{BACK}, {BLOCKS}", {f"{BACK}, {BLOCKS}": f"3.000 of {FIRST}"}, [*TIMES]),
        (FIRST, {f"{TITLE}, {FIRST}": f"1.000 of {FIRST}", f"{BACK}, {FIRST}": f"1.000 of {FIRST}"}, [*TIMES][:2]),
        (CUDNN, {}, []),
        ("copy", {}, []),
    ],
)
def test_attention_has_readings_of_what_is_asked_for(
    fake: Device, only: str, left: dict[str, str], timed: list[str]
) -> None:
    assert shares(only) == left
    assert fake.timed == timed


def test_batches_are_as_their_lengths_say() -> None:
    layout = attended.layouts_of(CPU, attended.SHARED)[FIRST]
    assert layout.starts.tolist()[:6] == [0, 1280, 1536, 1792, 2048, 3328]
    assert (layout.longest, layout.even, layout.blocks) == (2048, False, None)


def test_a_copy_has_a_row_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "copies", lambda device: iter([("copy", print, 8)]))
    monkeypatch.setattr(kernels, "cases", lambda device: iter([("outer", print, 8), ("gate", print, 4)]))
    monkeypatch.setattr(kernels, "seconds", lambda call, calls: 2.0)
    monkeypatch.setattr(kernels, "attempt", lambda name, call, calls: 4.0)

    def found(only: str) -> dict[str, str]:
        return {one.name: one.share for one in kernels.memory_readings(CPU, only)}

    shares = {"copy": "1.000 of copy", "outer": "0.500 of copy", "gate": "0.250 of copy"}
    assert found("") == shares
    for name, share in shares.items():
        assert found(name) == {name: share}


def test_products_are_held_against_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times: dict[str, float | None] = {"bf16 o": 6.0, "fp8 o": 3.0}
    monkeypatch.setattr(kernels, "KINDS", {"bf16": lambda *_: print, "fp8": lambda *_: print})
    monkeypatch.setattr(kernels, "PRODUCTS", {"o": (8, 8)})
    monkeypatch.setattr(kernels, "attempt", lambda name, call, calls: times[name])

    def found(only: str) -> dict[str, str]:
        return {one.name: one.share for one in kernels.product_readings(CPU, only)}

    assert found("") == {"bf16 o": "1.000 of bf16", "fp8 o": "2.000 of bf16"}
    assert found("fp8") == {"fp8 o": "2.000 of bf16"}
    times["bf16 o"] = None
    assert found("") == {"fp8 o": ""}


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def readings(device: torch.device, only: str) -> Iterator[Reading]:
        yield Reading("one", 0.5, "8 GB/s", "")
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(kernels, "here", lambda: torch.device("cuda"))
    monkeypatch.setattr(meter, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(kernels, "memory_readings", readings)
    asked = kernels.WORDS | {"results": f"{tmp_path}/rows.csv", "commit": "c0ffee", "note": "again"}
    with pytest.raises(RuntimeError, match="lost"):
        kernels.main(asked)
    (row,) = compare.read_rows(tmp_path / "rows.csv")
    assert [row[key] for key in ("settings", "step_seconds", "note")] == ["name=one", "0.50000000", "8 GB/s, again"]
