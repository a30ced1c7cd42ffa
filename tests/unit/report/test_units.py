# ruff: noqa: RUF001 - the signs of typography are meant
import pytest

from burnish.report.units import compact, count, duration, listing, percent, signed, size


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (size(0), "0 B"),
        (size(1023), "1023 B"),
        (size(1024), "1.00 KiB"),
        (size(96_500_000), "92.0 MiB"),
        (size(1024**3 - 1), "1.00 GiB"),  # not 1024 MiB
        (size(5.54 * 2**30), "5.54 GiB"),
        (count(999), "999"),
        (count(52_224), "52.2k"),
        (count(999_999), "1.00M"),
        (count(6_738_415_616), "6.74B"),
        (duration(0.04), "0.0 s"),
        (duration(9.949), "9.9 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(102), "1 min 42 s"),
        (duration(3599.7), "1 h 00 min"),
        (duration(7500), "2 h 05 min"),
        (percent(0), "0%"),
        (percent(1), "100%"),
        (percent(0.841), "84.1%"),
        (percent(0.00036), "0.036%"),
        (signed(0.0123), "+0.012"),
        (signed(-0.3), "−0.300"),
        (signed(-0.0001), "0.000"),
        (compact(0), "0"),
        (compact(2e-4), "2e-4"),
        (compact(-0.000125), "-1.25e-4"),
        (compact(0.25), "0.25"),
        (compact(5500), "5,500"),
        (compact(12_000), "12k"),
        (listing(["a"]), "a"),
        (listing(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers_are_said_as_people_say_them(said: str, meant: str) -> None:
    assert said == meant
