"""Charts as SVG text, drawn in the page's own colours: classes `s0` to `s7` are series, the rest is ink and rules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from burnish.report.units import MINUS, compact

NUM_STYLES = 8
"""How many colours and dash patterns the page's stylesheet tells apart."""

CHARACTER = 6.2
"""About how wide a digit is, in units of the picture."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart. Points whose y is not finite are gaps in it."""

    label: str
    points: tuple[Point, ...]
    style: int = 0
    """Which of the page's colours and dash patterns."""
    faint: bool = False
    """Drawn behind the others and left out of the description: the raw values under a smoothed line."""
    dots: bool = False
    """A dot at each point, for values measured now and then."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Where data lies in the picture."""

    width: float
    height: float
    left: float
    x: tuple[float, float]
    y: tuple[float, float]

    TOP, BOTTOM, RIGHT = 10.0, 34.0, 12.0

    def place(self, point: Point) -> Point:
        """Data to picture."""
        (low_x, high_x), (low_y, high_y) = self.x, self.y
        across, up = (point[0] - low_x) / (high_x - low_x), (point[1] - low_y) / (high_y - low_y)
        right, bottom = self.width - self.RIGHT, self.height - self.BOTTOM
        return self.left + across * (right - self.left), bottom - up * (bottom - self.TOP)


def line_chart(
    series: Sequence[Series], title: str, x_label: str = "step", width: float = 400, height: float = 230
) -> str:
    """A line chart with axes; the page's legend says which line is whose, a screen reader is told in words.

    One point is drawn as a dot; without any finite point the picture says that there is no data.
    """
    finite = [point for line in series for point in line.points if all(map(math.isfinite, point))]
    head = _head(width, height, _describe(series, title))
    if not finite:
        middle = f'x="{width / 2:g}" y="{height / 2:g}" text-anchor="middle"'
        return f"{head}<text {middle}>no data</text></svg>"
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    y_low, y_high = min(y for _, y in finite), max(y for _, y in finite)
    y_ticks = nice_ticks(y_low, y_high, 5)
    top = y_high + 0.03 * (y_high - y_ticks[0]) if y_high > y_low else y_ticks[-1]
    y_ticks = [tick for tick in y_ticks if tick <= top]
    spread = (x_low, x_high) if x_high > x_low else (x_low - 0.5, x_high + 0.5)
    frame = Frame(width, height, _margin(y_ticks), spread, (y_ticks[0], top))
    x_ticks = [t for t in nice_ticks(x_low, x_high, max(2, int(width / 50))) if x_low <= t <= x_high and t == int(t)]
    lines = [_line(line, frame) for line in sorted(series, key=lambda line: not line.faint)]
    return head + _axes(frame, x_ticks, y_ticks, x_label) + "".join(lines) + "</svg>"


def bar_chart(
    bars: Sequence[tuple[str, float]], title: str, x_label: str, width: float = 400, height: float = 150
) -> str:
    """A bar for each (label, count), from left to right; labels are thinned where they would touch."""
    highest = max((value for _, value in bars), default=0.0)
    words = f"{title}: " + ", ".join(f"{label}: {compact(value)}" for label, value in bars)
    head = _head(width, height, words)
    if highest <= 0:
        return f'{head}<text x="{width / 2:g}" y="{height / 2:g}" text-anchor="middle">no data</text></svg>'
    ticks = nice_ticks(0, highest, 3)
    frame = Frame(width, height, _margin(ticks), (0, len(bars)), (0, ticks[-1]))
    longest = max(len(label) for label, _ in bars)
    every = max(1, math.ceil(len(bars) * CHARACTER * (longest + 2) / (width - frame.left)))
    parts = [_axes(frame, [], ticks, x_label)]
    for i, (label, value) in enumerate(bars):
        (x0, bottom), (x1, top) = frame.place((i + 0.08, 0)), frame.place((i + 0.92, value))
        box = f'x="{_n(x0)}" y="{_n(top)}" width="{_n(x1 - x0)}" height="{_n(bottom - top)}"'
        parts.append(f'<rect class="bar" {box}><title>{escape(label)}: {compact(value)}</title></rect>')
        if i % every == 0:
            parts.append(
                f'<text x="{_n((x0 + x1) / 2)}" y="{_n(bottom + 14)}" text-anchor="middle">{escape(label)}</text>'
            )
    return head + "".join(parts) + "</svg>"


def nice_ticks(low: float, high: float, target: int) -> list[float]:
    """About `target` evenly spaced round numbers (1, 2 or 5 times a power of ten) that span low to high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant, but for rounding
        margin = abs(low) / 2 or 1.0
        low, high = (0.0, 1.0) if low == 0 else (low - margin, high + margin)
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    digits = max(0, 1 - math.floor(math.log10(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, digits) for k in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Ticks as text, all with as many digits after the point as their step needs."""
    largest = max(map(abs, ticks))
    if len(ticks) < 2 or largest >= 10_000 or largest < 0.001:
        return [compact(tick) for tick in ticks]
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [f"{tick:,.{digits}f}".replace("-", MINUS) for tick in ticks]


def smooth(points: Sequence[Point], span: int) -> list[Point]:
    """Each point moved onto the straight line that fits best through the `span` points around it; gaps stay gaps.

    Unlike a running mean this neither lags behind a steep curve nor bends at its ends. It never leaves the range of
    the points, as lines do where a curve bends: no accuracy is below 0.
    """
    found: list[Point] = []
    for i, (x, y) in enumerate(points):
        start = max(0, min(i - span // 2, len(points) - span))
        near = [(x_near, y_near) for x_near, y_near in points[start : start + span] if math.isfinite(y_near)]
        found.append((x, _fit(near, x) if math.isfinite(y) else math.nan))
    return found


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` of the points, evenly spread from the first to the last: a long run makes no long page."""
    if len(points) <= limit:
        return list(points)
    return [points[i * (len(points) - 1) // (limit - 1)] for i in range(limit)]


def extremes(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` of the points, the lowest and the highest of each stretch: no spike is lost; gaps are."""
    if len(points) <= limit:
        return list(points)
    edges = [len(points) * i // (limit // 2) for i in range(limit // 2 + 1)]
    stretches = [[p for p in points[start:stop] if math.isfinite(p[1])] for start, stop in pairwise(edges)]
    ends = [(min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])) for s in stretches if s]
    return sorted({point for pair in ends for point in pair})


def _head(width: float, height: float, words: str) -> str:
    """The start of a picture that says in words what it shows."""
    return f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(words)}">'


def _fit(points: Sequence[Point], at: float) -> float:
    """The value at `at` of the line of least squares through the points, within their range."""
    mean_x, mean_y = (math.fsum(values) / len(points) for values in zip(*points, strict=True))
    variance = math.fsum((x - mean_x) ** 2 for x, _ in points)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / variance if variance else 0.0
    values = [y for _, y in points]
    return min(max(mean_y + slope * (at - mean_x), min(values)), max(values))


def _axes(frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
    right, bottom = frame.width - frame.RIGHT, frame.height - frame.BOTTOM
    parts: list[str] = []
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = frame.place((frame.x[0], tick))[1]
        parts.append(f'<path class="rule" d="M{_n(frame.left)} {_n(y)}H{_n(right)}"/>')
        parts.append(f'<text x="{_n(frame.left - 6)}" y="{_n(y + 3.5)}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        x = frame.place((tick, frame.y[0]))[0]
        parts.append(f'<path class="tick" d="M{_n(x)} {_n(bottom)}v4"/>')
        parts.append(f'<text x="{_n(x)}" y="{_n(bottom + 15)}" text-anchor="middle">{compact(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_n(frame.left)} {_n(bottom)}H{_n(right)}"/>')
    middle = f'x="{_n((frame.left + right) / 2)}" y="{_n(frame.height - 4)}" text-anchor="middle"'
    return "".join(parts) + f'<text class="label" {middle}>{escape(x_label)}</text>'


def _margin(y_ticks: Sequence[float]) -> float:
    """Room for the labels at the left."""
    return 10 + CHARACTER * max(map(len, tick_labels(y_ticks)))


def _line(line: Series, frame: Frame) -> str:
    name = f"s{line.style % NUM_STYLES}" + (" faint" if line.faint else "")
    path: list[str] = []
    dots: list[Point] = []
    for good, stretch in groupby(line.points, key=lambda point: all(map(math.isfinite, point))):
        if good:
            placed = list(stretch)
            path.append(_path([frame.place(point) for point in placed]))
            dots += placed if line.dots or len(placed) == 1 else []
    drawn = f'<path class="line {name}" d="{"".join(path)}"/>' if path else ""
    return drawn + "".join(_dot(point, line.label, name, frame) for point in dots)


def _dot(point: Point, label: str, name: str, frame: Frame) -> str:
    x, y = frame.place(point)
    title = f"<title>{escape(label)}, {compact(point[0])}: {point[1]:.4g}</title>"
    return f'<circle class="dot {name}" cx="{_n(x)}" cy="{_n(y)}" r="3">{title}</circle>'


def _describe(series: Sequence[Series], title: str) -> str:
    """The chart in words: where each line starts and ends."""
    words: list[str] = []
    for line in series:
        values = [y for _, y in line.points if math.isfinite(y)]
        if values and not line.faint:
            words.append(f"{line.label} from {compact(values[0])} to {compact(values[-1])}")
    return f"{title}: " + ("; ".join(words) or "no data")


def _path(places: Sequence[Point]) -> str:
    """A polyline, each point told from the one before: half the length of telling where each is."""
    tenths = [(round(10 * x), round(10 * y)) for x, y in places]
    steps = [f"{_n((x1 - x0) / 10)} {_n((y1 - y0) / 10)}" for (x0, y0), (x1, y1) in pairwise(tenths)]
    start = f"M{_n(tenths[0][0] / 10)} {_n(tenths[0][1] / 10)}"
    return start + ("l" + " ".join(steps) if steps else "")


def _n(value: float) -> str:
    """A coordinate to a tenth of a unit, as short as it goes."""
    return f"{value:.1f}".removesuffix(".0")
