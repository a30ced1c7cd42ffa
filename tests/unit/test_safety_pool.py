"""Jobs side by side: what breaks one leaves the others, and the clock is kept."""

import os
import time
from collections.abc import Iterator

import pytest

from benchmarks.safety_pool import Pool
from benchmarks.turns import Clock


def count(job: tuple[str, float]) -> Iterator[tuple[str, int]]:
    """Two results, unless the name of the job says otherwise."""
    name, seconds = job
    yield name, os.getpid()
    time.sleep(seconds)
    if name == "fails":
        raise ValueError("as it was told")
    if name == "dies":
        os._exit(3)
    yield name, os.getpid()


def test_results_come_from_several_processes_and_one_after_the_other_in_each() -> None:
    with Pool(count, 2) as pool:
        found = list(pool.results([(name, 0.1) for name in "abcd"], Clock(30)))
    assert sorted(name for name, _ in found) == sorted("aabbccdd")
    assert len({process for _, process in found}) == 2
    assert len(set(found)) == 4


def test_what_breaks_a_job_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with Pool(count, 1) as pool:
        found = list(pool.results([("fails", 0.0), ("dies", 0.0), ("a", 0.0)], Clock(30)))
    assert [name for name, _ in found] == ["fails", "dies", "a", "a"]
    assert len({process for _, process in found}) == 3
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "('fails', 0.0) failed: ValueError: as it was told",
        "('dies', 0.0) failed: its process ended with exit status 3",
    ]


def test_a_clock_that_runs_out_cuts_off_what_runs_and_keeps_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    with Pool(count, 1) as pool:
        (_, process), _ = pool.results([("a", 0.0)], Clock(30))  # it is up
        began = time.monotonic()
        found = list(pool.results([("long", 60.0), ("b", 0.0)], Clock(1)))
    assert found == [("long", process)]
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert capsys.readouterr().out.splitlines() == [
        "('long', 60.0) is cut off: no time is left",
        "('b', 0.0) is not run: 0 s are left",
    ]


class Told(Clock):
    """A clock that is told what is left each time somebody looks."""

    def __init__(self, left: float, a_look: float) -> None:
        super().__init__(0.0)
        self._left, self._a_look = left, a_look

    def left(self) -> float:
        """So much less than last time."""
        self._left -= self._a_look
        return self._left


def test_no_job_is_begun_that_the_clock_would_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    with Pool(count, 1) as pool:
        found = list(pool.results([(name, 0.0) for name in "abc"], Told(100.0, 10.0)))
    # A job begins, gives a result twice, and is done: 40 of the 100 are gone at the end of the first.
    assert "a" in {name for name, _ in found}
    assert "c" not in {name for name, _ in found}
    assert "('c', 0.0) is not run" in capsys.readouterr().out
