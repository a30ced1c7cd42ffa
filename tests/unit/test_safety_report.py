"""The rule by which FP8 is called safe, on made-up runs."""

from collections.abc import Mapping

import pytest

from benchmarks.safety_report import Comparison, Effect, compare, report, together
from benchmarks.safety_run import Entry, Gradients, Measured, Reading

SEEDS = (0.98, 1.0, 1.02, 1.0)
"""Losses in bf16: a mean of 1, a standard deviation of 0.0163."""


def ended(entry: Entry, loss: float, reads: str = "bf16", gradients: Gradients | None = None) -> Measured:
    readings = {
        name: Reading(times * loss, 0.5, (0.0, 2 * times * loss))
        for name, times in (("seen", 1), ("unseen", 2), ("general", 3))
    }
    return Measured(entry, 8, reads, True, readings, 1.0, 1.0, gradients)


def runs(changes: Mapping[str, tuple[float, ...]], base: str = "bf16") -> list[Measured]:
    """Seeds in bf16, and as many in each other maths, so much above those."""
    found = [ended(Entry(base, "bf16", seed), loss) for seed, loss in enumerate(SEEDS)]
    for maths, by_seed in changes.items():
        found += [
            ended(Entry(base, maths, seed), loss + more)
            for seed, (loss, more) in enumerate(zip(SEEDS, by_seed, strict=False))
        ]
    return found


def found_in(measured: list[Measured], *bases: str) -> Comparison | None:
    return compare({(one.entry, one.reads): one for one in measured}, bases, "fp8", "unseen")


def test_costs_and_spread_are_shares_of_the_loss() -> None:
    found = found_in(runs({"fp8": (0.01, 0.03, 0.01, 0.03)}), "bf16")
    assert found is not None
    assert found.seeds == 4
    assert found.spread == pytest.approx((0.0008 / 3) ** 0.5)
    assert found.cost == pytest.approx((0.02, (0.0004 / 3) ** 0.5 / 2))  # losses of unseen families are twice as large
    assert found.most == pytest.approx(0.02 + 2.35 * found.cost.error)


def test_bases_together_have_the_seeds_of_both_and_the_mean_of_their_variances() -> None:
    measured = runs({"fp8": (0.01, 0.01, 0.01, 0.01)}) + runs({"fp8": (0.03, 0.03)}, "nf4")
    found = found_in(measured, "bf16", "nf4")
    assert found is not None
    assert (found.seeds, found.cost.mean) == (6, pytest.approx(0.1 / 6))
    assert found.spread == pytest.approx((0.0008 / 3) ** 0.5)
    assert found_in(runs({"fp8": (0.01,)}), "bf16") is None


@pytest.mark.parametrize(
    ("cost", "error", "spread", "verdict"),
    [
        (0.0, 0.001, 0.001, "safe"),  # surely below 1 %, whatever seeds do
        (0.02, 0.005, 0.02, "safe"),  # surely below what seeds do, and not surely above 0
        (-0.05, 0.02, 0.001, "safe"),  # better
        (0.02, 0.004, 0.5, "costs"),  # surely there and above 1 %: what seeds do is no excuse
        (0.02, 0.01, 0.01, "not settled"),
        (0.009, 0.001, 0.001, "not settled"),  # surely there; whether above 1 % is not sure
        (0.009, 0.0001, 0.001, "safe"),
        (0.0, 0.02, 0.01, "not settled"),  # a mean of nothing that may be luck
    ],
)
def test_the_rule(cost: float, error: float, spread: float, verdict: str) -> None:
    assert Comparison(4, Effect(cost, error), spread).verdict == verdict


def test_more_seeds_settle_what_fewer_do_not() -> None:
    few, more = (Comparison(seeds, Effect(0.003, 0.004), 0.001) for seeds in (2, 12))
    assert (few.verdict, more.verdict) == ("not settled", "not settled")
    assert few.most > more.most == pytest.approx(0.003 + 1.83 * 0.004)
    assert Comparison(12, Effect(0.002, 0.004), 0.001).verdict == "safe"


def test_the_worst_verdict_counts() -> None:
    assert together(["safe", "costs", "not settled"]) == "costs"
    assert together(["safe", "not settled"]) == "not settled"
    assert together(["safe", "safe"]) == "safe"


def test_the_report_has_every_kind_and_leaves_out_runs_that_were_cut_off() -> None:
    measured = runs({"fp8": (0.001, -0.001, 0.002, -0.002), "fp8-slow": (0.1, 0.11, 0.1, 0.11)})
    moved = Gradients(0.05, 0.01, 0.9)
    measured += [ended(Entry("bf16", "bf16", seed), loss * 1.02, "fp8", moved) for seed, loss in enumerate(SEEDS)]
    measured.append(ended(Entry("bf16", "fp8", 4), 7.0)._replace(end=False))
    lines = report(measured)
    assert lines[-2:] == ["bf16, fp8: safe", "bf16, fp8-slow: costs"]
    assert len([line for line in lines if line.startswith("bf16 bf16 seed ")]) == 8
    (seen,) = [line for line in lines if line.startswith("| bf16 | fp8 | seen |")]
    cells = [cell.strip() for cell in seen.split("|")[1:-1]]
    assert cells[3:7] == ["4", "1.0000", "1.6%", "+0.00000 ± 0.00091"]
    assert cells[9:] == ["+0.00000 ± 0.00091", "50.0% ± 14.4%", "safe"]  # a question that is not changed counts half
    assert "bf16 trained in bf16, read in fp8: seen +2.00% ± 0.00%, unseen +2.00% ± 0.00%, general +2.00% ± 0.00%" in (
        lines
    )
    (gradients,) = [line for line in lines if "the gradient of a batch" in line]
    assert gradients.endswith(
        "fp8 moves it by 5.00% of its norm, 1.00% shared by all batches; another batch moves it by 90%"
    )


def test_a_report_of_too_little_has_no_verdict() -> None:
    assert not any("safe" in line for line in report([]) + report(runs({"fp8": (0.0,)})))
