from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.units import DurationError, SizeError, format_rate, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("1k", 1 << 10),
        ("64K", 64 << 10),
        ("3m", 3 << 20),
        ("10G", 10 << 30),
        ("2t", 2 << 40),
        (" 7M ", 7 << 20),
        ("0000000000000000000000000001", 1),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_sizes_are_bytes_or_have_a_suffix(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1.5G", "1 G", "10GB", "10X", "0x10", "1e3", "1_000", "٣", "1\n2", "inf"]
)
def test_what_is_no_size_is_named_in_one_line(text: str) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["9223372036854775808", "8388608T", "9" * 5000, "9" * 5000 + "T"])
def test_sizes_beyond_off_t_are_refused(text: str) -> None:
    with pytest.raises(SizeError, match="too large"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        (10 << 30, "10 GiB"),
        (1 << 50, "1 PiB"),
        (1 << 63, "8 EiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_fitting_unit(size: int, text: str) -> None:
    assert format_size(size) == text


def test_rates_are_sizes_per_second() -> None:
    assert format_rate(812.4 * (1 << 20)) == "812.4 MiB/s"


@given(st.integers(0, 1 << 63))
def test_no_size_is_shown_as_1024_of_a_unit(size: int) -> None:
    assert float(format_size(size).split()[0]) < 1024


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5ms", 0.005), ("200us", 0.0002), ("1.5s", 1.5), ("30", 30), ("2m", 120), ("1h", 3600), (" 7s ", 7)],
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5 ms", "ms", "-1s", "0", "0ms", "1e3", "5d", "9999999h", "\u0665s", "1.s"])
def test_what_is_no_time_is_refused_on_one_line(text: str) -> None:
    with pytest.raises(DurationError) as error:
        parse_duration(text)
    assert "\n" not in str(error.value)
