"""A picture of speed against memory: a point for every system and setting, and the speeds that a GPU cannot pass."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from burnish.report.charts import CHARACTER, Frame, nice_ticks, tick_labels

COLOURS = {"burnish": "#c2410c", "unsloth": "#2563eb", "trl": "#4d7c0f"}
NAMES = {"burnish": "Burnish", "unsloth": "Unsloth", "trl": "TRL"}
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#1f2937;stroke:#fff;stroke-width:3px;paint-order:stroke}"
    ".faint{fill:#6b7280}.rule{stroke:#e5e7eb}.limit{stroke:#6b7280;stroke-dasharray:5 4}"
    ".lead{stroke:#9ca3af;stroke-width:.7}"
)
WIDTH, HEIGHT, LEGEND = 720.0, 430.0, 30.0
LINE = 13.0
"""The height of a label."""


class Dot(NamedTuple):
    """One setting of one system."""

    system: str
    label: str
    gib: float
    speed: float
    square: bool
    """Squares are weights in 16 bits, circles in 4."""


class Limit(NamedTuple):
    """A speed that the arithmetic does not let anybody pass."""

    label: str
    speed: float


def scatter(dots: Sequence[Dot], limits: Sequence[Limit], title: str) -> str:
    """The picture as SVG, a file of its own."""
    x_ticks = nice_ticks(0, max((dot.gib for dot in dots), default=1.0), 8)
    y_ticks = nice_ticks(0, 1.02 * max([dot.speed for dot in dots] + [limit.speed for limit in limits]), 6)
    frame = Frame(WIDTH, HEIGHT - LEGEND, 64, (0, x_ticks[-1]), (0, y_ticks[-1]))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH:g}" height="{HEIGHT:g}" fill="#ffffff"/>',
        *_axes(frame, x_ticks, y_ticks),
        *(_limit(limit, frame) for limit in limits),
        *_dots(dots, frame),
        *_legend(dots),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _axes(frame: Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    right, bottom = frame.width - frame.RIGHT, frame.height - frame.BOTTOM
    parts: list[str] = []
    for tick in y_ticks:
        y = frame.place((0, tick))[1]
        parts.append(f'<path class="rule" d="M{frame.left:g} {y:.1f}H{right:g}"/>')
        parts.append(f'<text x="{frame.left - 6:g}" y="{y + 4:.1f}" text-anchor="end">{tick:,.0f}</text>')
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = frame.place((tick, 0))[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16:g}" text-anchor="middle">{label}</text>')
    middle = (frame.left + right) / 2
    parts.append(
        f'<text class="faint" x="{middle:g}" y="{bottom + 31:g}" text-anchor="middle">peak GiB allocated</text>'
    )
    turned = f'transform="translate(12 {bottom / 2:g}) rotate(-90)"'
    parts.append(f'<text class="faint" {turned} text-anchor="middle">tokens per second</text>')
    return parts


def _limit(limit: Limit, frame: Frame) -> str:
    y, right = frame.place((0, limit.speed))[1], frame.width - frame.RIGHT
    line = f'<path class="limit" d="M{frame.left:g} {y:.1f}H{right:g}"/>'
    return f'{line}<text class="faint" x="{frame.left + 6:g}" y="{y - 4:.1f}">{escape(limit.label)}</text>'


def _dots(dots: Sequence[Dot], frame: Frame) -> list[str]:
    """Points, each with its label beside it: as near as the others let it, on the right before the left."""
    parts: list[str] = []
    places = [frame.place((dot.gib, dot.speed)) for dot in dots]
    taken = [(x - 7, x + 7, y + 4) for x, y in places]
    for dot in sorted(dots, key=lambda dot: -dot.speed):
        x, y = frame.place((dot.gib, dot.speed))
        width = CHARACTER * len(dot.label)
        start, level = _beside(x, y, width, taken, frame)
        left = start < x
        taken.append((start, start + width, level))
        if abs(level - y - 4) > LINE / 2:
            parts.append(
                f'<path class="lead" d="M{x:.1f} {y:.1f}L{start - 1 if not left else x - 8:.1f} {level - 4:.1f}"/>'
            )
        parts.append(_mark(x, y, COLOURS[dot.system], dot.square, f"{NAMES[dot.system]}, {dot.label}"))
        anchor, at = ("end", x - 9) if left else ("start", start)
        parts.append(f'<text x="{at:.1f}" y="{level:.1f}" text-anchor="{anchor}">{escape(dot.label)}</text>')
    return parts


def _beside(
    x: float, y: float, width: float, taken: Sequence[tuple[float, float, float]], frame: Frame
) -> tuple[float, float]:
    """Where a label begins: on the right, on the left, then ever further down or up; each of `taken` is kept clear."""
    for shift in range(0, round(frame.height), 2):
        for level in (y + 4 + shift, y + 4 - shift):
            for start in (x + 9, x - 9 - width):
                across = frame.left < start and start + width < frame.width - frame.RIGHT
                inside = across and frame.TOP + 8 < level < frame.height - frame.BOTTOM
                near = (at for begin, stop, at in taken if start < stop and begin < start + width)
                if inside and all(abs(level - at) >= LINE for at in near):
                    return start, level
    return x + 9, y + 4


def _mark(x: float, y: float, colour: str, square: bool, words: str) -> str:
    title = f"<title>{escape(words)}</title>" if words else ""
    if square:
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{colour}">{title}</rect>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}">{title}</circle>'


def _legend(dots: Sequence[Dot]) -> list[str]:
    """Which colour is whose, and what a mark's form says."""
    marks = [(COLOURS[name], False, NAMES[name]) for name in COLOURS if any(dot.system == name for dot in dots)]
    marks += [("#6b7280", square, words) for square, words in ((False, "NF4 weights"), (True, "bf16 weights"))]
    parts: list[str] = []
    x, y = 72.0, HEIGHT - 12
    for colour, square, words in marks:
        parts.append(_mark(x, y - 4, colour, square, ""))
        parts.append(f'<text x="{x + 10:g}" y="{y:g}">{escape(words)}</text>')
        x += 34 + CHARACTER * len(words)
    return parts
