"""Numbers and lists as people read them."""

import math
from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
ABSENT = "\N{EN DASH}"
"""What stands where a number was not measured."""


def size(num_bytes: float) -> str:
    """Bytes in B, KiB, MiB, GiB or TiB: `245 MiB`."""
    number, unit = _scaled(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    return f"{number} {unit}"


def count(number: float) -> str:
    """A count in ones, thousands (k), millions (M), billions (B) or trillions (T): `3.41M`."""
    digits, unit = _scaled(number, 1000, ("", "k", "M", "B", "T"))
    return digits + unit


def duration(seconds: float) -> str:
    """A time in its two largest units: `4.2 s`, `34 s`, `1 min 42 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float) -> str:
    """A share in percent, to one digit after the point, or two significant ones when it is small: `84.1%`, `0.036%`."""
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f}%"
    digits = 1 if abs(value) >= 0.1 else 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{digits}f}%"


def signed(value: float) -> str:
    """A change, to three digits after the point, with its sign: `+0.012`, `−0.300`."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", MINUS)


def decimal(value: float, digits: int) -> str:
    """A number to so many digits after the point: `0.52`, `−1.30`."""
    return f"{value + 0.0:.{digits}f}".replace("-", MINUS) if round(value, digits) else f"{0:.{digits}f}"


def compact(value: float) -> str:
    """A number as short as it goes, for an axis or a setting: `0.25`, `2e-4`, `12k`."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        number, unit = _scaled(value, 1000, ("", "k", "M", "B", "T"))
        return (number.rstrip("0").rstrip(".") if "." in number else number) + unit
    if abs(value) < 0.001:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def listing(words: Sequence[str]) -> str:
    """Words as a sentence lists them: `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _scaled(value: float, factor: int, units: tuple[str, ...]) -> tuple[str, str]:
    """Three significant digits (whole numbers in the first unit), and the unit that keeps them below the factor."""
    power = 0
    while abs(value) >= (factor - 0.5 if power == 0 else 999.5) and power < len(units) - 1:
        value, power = value / factor, power + 1
    if power == 0:
        return f"{value:.0f}", units[0]
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}", units[power]
