"""What a line carries: it is filled, whatever it is, and no more is on its way than that takes."""

from __future__ import annotations

import pytest

from nbdstream.stream.line import Line

MIB = 1 << 20


def settled(rate: float, round_trip: float, fetch: int = MIB) -> float:
    """Return how many seconds the line's queue takes when what it says is on its way, after a while."""
    line = Line()
    now = 0.0
    for _ in range(300):
        in_flight = line.bytes_to_fill
        took = max(round_trip + fetch / rate, in_flight / rate)
        now += took
        line.arrived(now, took, int(min(in_flight, took * rate)))
    return line.bytes_to_fill / rate


@pytest.mark.parametrize("rate", [10e6, 100e6, 1e9])
@pytest.mark.parametrize("round_trip", [0.0005, 0.025, 0.2])
def test_a_line_is_filled_and_its_queue_stays_short(rate: float, round_trip: float) -> None:
    filled = round_trip + MIB / rate
    assert filled <= settled(rate, round_trip) <= max(filled + 0.2, 1.1 * MIB / rate)


def test_a_line_that_becomes_slower_holds_less_after_a_while() -> None:
    line = Line()
    line.arrived(0.0, 0.025, 8 * MIB)
    fast = line.bytes_to_fill
    for second in range(1, 12):
        line.arrived(float(second), 0.5, MIB)
    assert line.bytes_to_fill < fast / 4


def test_what_the_line_itself_holds_is_less_than_what_fills_it() -> None:
    line = Line()
    assert line.bytes_held == 0
    line.arrived(0.0, 0.025, 2 * MIB)
    assert line.bytes_held == 2 * MIB < line.bytes_to_fill


def test_what_arrives_within_a_time_is_no_less_than_within_the_quickest_fetch() -> None:
    line = Line()
    assert line.bytes_within(1.0) == 0, "nothing is known yet"
    line.arrived(0.0, 0.1, 100)
    line.arrived(0.0, 0.2, 200)
    assert [line.bytes_within(seconds) for seconds in (0.01, 0.1, 0.5)] == [100, 100, 500]


def test_another_line_is_learnt_anew() -> None:
    line = Line()
    line.arrived(0.0, 0.001, 100 * MIB)
    line.reset()
    assert line.bytes_to_fill == Line().bytes_to_fill


def test_a_fetch_that_took_no_time_says_nothing() -> None:
    line = Line()
    line.arrived(0.0, 0.0, MIB)
    assert line.bytes_to_fill == Line().bytes_to_fill
