# ruff: noqa: RUF001 - the signs of typography are meant
import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.report.charts import Series, bar_chart, extremes, line_chart, nice_ticks, smooth, thin, tick_labels

finite = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: round(x, 6))


def places(path: str) -> list[list[tuple[float, float]]]:
    """Where the strokes of a path lead: `M x y`, then the rest told from the point before."""
    strokes: list[list[tuple[float, float]]] = []
    for stroke in path.split("M")[1:]:
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", stroke)]
        x, y = numbers[:2]
        strokes.append([(x, y)])
        for dx, dy in zip(numbers[2::2], numbers[3::2], strict=True):
            x, y = x + dx, y + dy
            strokes[-1].append((x, y))
    return strokes


def lines(svg: str) -> list[str]:
    return [e.attrib["d"] for e in ElementTree.fromstring(svg).iter("path") if e.attrib["class"].startswith("line")]


@given(finite, finite)
def test_ticks_are_round_few_and_span_the_data(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, 5)
    step = ticks[1] - ticks[0]
    hair = 1e-8 * step
    assert ticks[0] - hair <= low <= high <= ticks[-1] + hair
    assert 2 <= len(ticks) <= 8
    assert all(math.isclose(b - a, step, rel_tol=1e-6) for a, b in pairwise(ticks))
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_ticks_of_known_ranges() -> None:
    assert nice_ticks(0.4, 3.2, 5) == [0, 1, 2, 3, 4]
    assert nice_ticks(-1.000000000000003, -1, 5) == nice_ticks(-1, -1, 5)  # a constant, but for rounding
    assert nice_ticks(2.103, 2.203, 5) == [2.1, 2.12, 2.14, 2.16, 2.18, 2.2, 2.22]
    assert tick_labels([2.1, 2.15, 2.2]) == ["2.10", "2.15", "2.20"]
    assert tick_labels([0, 1e-4, 2e-4]) == ["0", "1e-4", "2e-4"]
    assert tick_labels([-1, 0, 1]) == ["−1", "0", "1"]


def test_smoothing_leaves_a_straight_line_and_gaps_alone() -> None:
    line = [(float(x), 3.0 - 0.5 * x) for x in range(20)]
    assert [y for _, y in smooth(line, 7)] == pytest.approx([y for _, y in line])
    line[4] = (4.0, math.nan)
    found = smooth(line, 7)
    assert math.isnan(found[4][1])
    assert found[5][1] == pytest.approx(0.5)


def test_smoothing_takes_the_jitter_out() -> None:
    jitter = [(float(x), 1.0 + 0.1 * (-1) ** x) for x in range(40)]
    assert max(abs(y - 1) for _, y in smooth(jitter, 9)[5:-5]) < 0.03


@given(st.lists(finite, min_size=1, max_size=60), st.integers(2, 20))
def test_thinning_picks_points_from_the_first_to_the_last(values: list[float], limit: int) -> None:
    points = [(float(x), y) for x, y in enumerate(values)]
    found = thin(points, limit)
    assert len(found) == min(limit, len(points))
    assert set(found) <= set(points)
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert found == sorted(set(found))


@given(st.lists(finite, min_size=1, max_size=60), st.integers(2, 20))
def test_thinning_to_the_extremes_loses_no_spike(values: list[float], limit: int) -> None:
    found = extremes([(float(x), y) for x, y in enumerate(values)], limit)
    assert len(found) <= limit
    assert {min(values), max(values)} <= {y for _, y in found}
    assert found == sorted(found)


def test_a_line_lies_where_its_data_says() -> None:
    svg = line_chart([Series("a", ((0, 0), (5, 1), (10, 4)))], "t", width=400, height=230)
    ((first, middle, last),) = places(lines(svg)[0])
    assert first[1] == 230 - 34  # y = 0 stands on the axis
    assert last[0] == 400 - 12
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert (first[1] - middle[1]) / (first[1] - last[1]) == pytest.approx(0.25, abs=0.01)


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(width=32)), max_size=30))
def test_whatever_the_data_the_picture_is_well_formed_and_nothing_leaves_it(points: list[tuple[int, float]]) -> None:
    svg = line_chart([Series("a", tuple((float(x), y) for x, y in sorted(points)))], "t", width=300, height=200)
    root = ElementTree.fromstring(svg)
    drawn = [place for path in lines(svg) for stroke in places(path) for place in stroke]
    drawn += [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]
    assert all(0 <= x <= 300 and 0 <= y <= 200 for x, y in drawn)
    assert bool(drawn) == any(math.isfinite(y) for _, y in points)
    assert ("no data" in svg) == (not drawn)


def test_one_point_is_a_dot_and_a_gap_splits_the_line() -> None:
    one = line_chart([Series("a", ((20, 1.5),))], "t")
    assert one.count("<circle") == 1
    gap = line_chart([Series("a", ((0, 1), (1, 2), (2, math.nan), (3, 2), (4, 1)))], "t")
    assert [len(stroke) for stroke in places(lines(gap)[0])] == [2, 2]


def test_a_chart_tells_in_words_what_it_shows_and_escapes_them() -> None:
    faint = Series("a", ((0, 9), (1, 9)), faint=True)
    svg = line_chart([Series('<b>"a"', ((0, 3.2), (1, 0.4))), faint], "Loss & more")
    assert ElementTree.fromstring(svg).attrib["aria-label"] == 'Loss & more: <b>"a" from 3.2 to 0.4'


def test_bars_are_as_high_as_their_counts_and_labels_do_not_touch() -> None:
    root = ElementTree.fromstring(bar_chart([(f"{10_000 * 2**i:,}", float(i)) for i in range(12)], "t", "x"))
    heights = [float(bar.attrib["height"]) for bar in root.iter("rect")]
    assert heights[0] == 0
    assert heights[10] / heights[5] == pytest.approx(2, abs=0.02)
    labels = [text for text in root.iter("text") if "," in (text.text or "")]
    assert len(labels) < 6
    assert "no data" in bar_chart([("1", 0.0)], "t", "x")
