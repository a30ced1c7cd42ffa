"""Whether FP8 is safe, from what runs have learnt: by a rule that was there before the numbers.

Runs of one seed differ in nothing but the maths they train with; at their end all of them are read in bf16, as an
adapter is that goes elsewhere. For each base and kind of FP8, with n seeds, of the loss on families of questions with
training rows (seen) and on others (unseen):

    cost    the mean over seeds of (FP8 - bf16), with its standard error e, over the mean loss in bf16
    spread  the standard deviation of bf16 runs that differ in their seed alone, over the same

The rule, by Student's t for n - 1 degrees of freedom:

    it costs        cost > t(99 %) e and cost > 1 %: a difference that is there, and is large enough to matter
    it is safe      not so, and cost + t(95 %) e < the larger of 1 % and twice the spread
    not settled     else

That |cost| itself be below the spread and below 1 % was the first thought; the table has what it takes to check that.
As a rule it asks for luck: where training is chaotic, FP8 that changes nothing but the course of rounding acts like
another seed, so differences scatter by 1.4 spreads and their mean over four seeds by 0.7. With a spread of 3 % of the
loss, harmless FP8 would fail the 1 % two times in three, and harm of 2 % would pass it one time in four. So the bound
on the cost counts, not the mean, and it is held against twice the spread: two runs of another seed are commonly
(1.4 to 2 spreads) as far apart, and nobody chooses between them. Even where harmless FP8 scatters like another seed,
four seeds find it safe two times in three, and six nine times in ten. A cost is asked to be sure at 99 %, since several
are looked for. FP8 is safe on a base where it is safe on seen and on unseen families; the line of both bases together
has the most seeds. Plain text (general) is shown beside.

Three measures without the noise of training stand beside it: the loss by question, where each counts the same, and the
share of questions that are worse; what bf16 runs lose when they are read in FP8; and how far FP8 moves the gradient of
a batch, and the part of that which all batches share, beside how far another batch moves it.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import mean, stdev
from typing import NamedTuple

from benchmarks.safety_run import MATHS, Entry, Measured

T95 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83)
T99 = (31.82, 6.96, 4.54, 3.75, 3.36, 3.14, 3.00, 2.90, 2.82)
"""Student's t, one-sided, for 1, 2, ... degrees of freedom."""
MATTERS = 0.01
"""The share of the loss from which on a cost matters."""
JUDGED = ("seen", "unseen")
HEADING = (
    "| base | FP8 | on | seeds | bf16 loss | spread | FP8 - bf16 | of the loss | at most | by question | worse on | |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
)
Ends = Mapping[tuple[Entry, str], Measured]
"""The last measurement of each run, by the maths that it is read in."""


class Effect(NamedTuple):
    """A mean over seeds and its standard error."""

    mean: float
    error: float


class Comparison(NamedTuple):
    """What FP8 changes, and what another seed changes; shares of the loss."""

    seeds: int
    cost: Effect
    spread: float

    @property
    def most(self) -> float:
        """What the cost is below, in 95 of 100 cases."""
        return self.cost.mean + student(T95, self.seeds) * self.cost.error

    @property
    def verdict(self) -> str:
        """By the rule."""
        if self.cost.mean > max(MATTERS, student(T99, self.seeds) * self.cost.error):
            return "costs"
        return "safe" if self.most < max(MATTERS, 2 * self.spread) else "not settled"


def report(measured: Sequence[Measured]) -> list[str]:
    """Every run's end, what FP8 changes, and the verdicts."""
    ends = {(one.entry, one.reads): one for one in measured if one.end}
    bases = sorted({entry.storage for entry, _ in ends})
    lines = [*runs(ends), "", *HEADING]
    verdicts: list[str] = []
    for maths, group in product(MATHS[1:], [[base] for base in bases] + [bases] * (len(bases) > 1)):
        found = {name: compare(ends, group, maths, name) for name in (*JUDGED, "general")}
        known = {name: one for name, one in found.items() if one is not None}
        lines += [row(ends, group, maths, name, one) for name, one in known.items()]
        if known:
            verdicts.append(f"{' and '.join(group)}, {maths}: {together([known[name].verdict for name in JUDGED])}")
    return [*lines, "", *readings(ends), "", *gradients(ends), "", *verdicts]


def runs(ends: Ends) -> Iterator[str]:
    """A line for each run and the maths that it is read in."""
    for (entry, reads), one in sorted(ends.items()):
        losses = " ".join(f"{name} {reading.loss:.4f}" for name, reading in one.held_out.items())
        about = f"{entry.storage} {entry.maths} seed {entry.seed} read in {reads}"
        yield f"{about}: {losses}, accuracy on seen {one.held_out['seen'].accuracy:.4f}"


def together(verdicts: Sequence[str]) -> str:
    """The verdict on all of them."""
    return next((verdict for verdict in ("costs", "not settled") if verdict in verdicts), "safe")


def pairs_of(ends: Ends, base: str, maths: str) -> list[tuple[Measured, Measured]]:
    """Runs of one seed in bf16 and in FP8, both read in bf16."""
    return [
        (one, ends[entry._replace(maths=maths), "bf16"])
        for (entry, reads), one in sorted(ends.items())
        if (entry.storage, entry.maths, reads) == (base, "bf16", "bf16")
        and (entry._replace(maths=maths), "bf16") in ends
    ]


def bf16_losses(ends: Ends, base: str, name: str) -> list[float]:
    """Those of all seeds, read in bf16."""
    return [
        one.held_out[name].loss
        for (entry, reads), one in ends.items()
        if (entry.storage, entry.maths, reads) == (base, "bf16", "bf16")
    ]


def compare(ends: Ends, bases: Sequence[str], maths: str, name: str) -> Comparison | None:
    """What this kind of FP8 changes on these bases together; None where one of them has fewer than two seeds."""
    differences: list[float] = []
    variances: list[float] = []
    for base in bases:
        pairs, losses = pairs_of(ends, base, maths), bf16_losses(ends, base, name)
        if len(pairs) < 2:
            return None
        differences += [(fp8.held_out[name].loss - bf16.held_out[name].loss) / mean(losses) for bf16, fp8 in pairs]
        variances.append((stdev(losses) / mean(losses)) ** 2)
    return Comparison(len(differences), effect(differences), mean(variances) ** 0.5)


def effect(values: Sequence[float]) -> Effect:
    """Mean and standard error; of a single value, which says nothing of the error, that is infinite."""
    return Effect(mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("inf"))


def student(table: Sequence[float], seeds: int) -> float:
    """Student's t of so many seeds; beyond the table its last, which is a little larger."""
    return table[min(seeds - 1, len(table)) - 1]


def row(ends: Ends, bases: Sequence[str], maths: str, name: str, found: Comparison) -> str:
    """A line of the table."""
    pairs = [pair for base in bases for pair in pairs_of(ends, base, maths)]
    by_question = [question_differences(pair, name) for pair in pairs]
    lost = mean([mean(bf16_losses(ends, base, name)) for base in bases])
    difference = effect([fp8.held_out[name].loss - bf16.held_out[name].loss for bf16, fp8 in pairs])
    cells = [" and ".join(bases), maths, name, str(found.seeds), f"{lost:.4f}", f"{found.spread:.1%}"]
    cells += [within(difference), shares(found.cost), f"{found.most:+.1%}"]
    cells += [within(effect([mean(changes) for changes in by_question]))]
    worse = effect([mean([(change > 0) + 0.5 * (change == 0) for change in changes]) for changes in by_question])
    cells += [f"{worse.mean:.1%} ± {worse.error:.1%}", found.verdict if name in JUDGED else ""]
    return f"| {' | '.join(cells)} |"


def question_differences(pair: tuple[Measured, Measured], name: str) -> list[float]:
    """FP8 - bf16 of each question."""
    bf16, fp8 = (one.held_out[name].questions for one in pair)
    return [after - before for before, after in zip(bf16, fp8, strict=True)]


def readings(ends: Ends) -> Iterator[str]:
    """What the same weights, trained in bf16, lose when they are read in FP8: no difference in training at all."""
    for base, maths in product(sorted({entry.storage for entry, _ in ends}), MATHS[1:]):
        trained = [(one, ends.get((entry, "bf16"))) for (entry, reads), one in ends.items() if reads == maths]
        pairs = [(exact, one) for one, exact in trained if exact is not None and one.entry.maths == "bf16"]
        pairs = [pair for pair in pairs if pair[0].entry.storage == base]
        if not pairs:
            continue
        cells: list[str] = []
        for name in pairs[0][0].held_out:
            changes = [rough.held_out[name].loss / exact.held_out[name].loss - 1 for exact, rough in pairs]
            cells.append(f"{name} {shares(effect(changes))}")
        yield f"{base} trained in bf16, read in {maths}: {', '.join(cells)}"


def gradients(ends: Ends) -> Iterator[str]:
    """How far FP8 moves a gradient, in the mean over seeds."""
    for base, maths in product(sorted({entry.storage for entry, _ in ends}), MATHS[1:]):
        found = [one.gradients for (entry, reads), one in ends.items() if entry.storage == base and reads == maths]
        known = [one for one in found if one is not None]
        if known:
            error, shared, noise = (mean(values) for values in zip(*known, strict=True))
            told = f"{maths} moves it by {error:.2%} of its norm, {shared:.2%} shared by all batches"
            yield f"{base}, the gradient of a batch: {told}; another batch moves it by {noise:.0%}"


def within(found: Effect) -> str:
    """A difference and its standard error."""
    return f"{found.mean:+.5f} ± {found.error:.5f}"


def shares(found: Effect) -> str:
    """The same as shares."""
    return f"{found.mean:+.2%} ± {found.error:.2%}"
